"""The language-model experiments at a tiny size: text, training runs, ablations, and train = serve."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from scripts.evidence import ablations, serve, trained
from scripts.evidence.language import Language, prepare
from scripts.evidence.results import Results, work_through
from support.models.tiny_qwen3 import tiny_llama


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Language:
    """A tiny model, and a text that it can learn: every token is one of three that follow from the one before."""
    folder = tmp_path_factory.mktemp("language")
    tiny_llama().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> torch.Tensor:
        return (3 + torch.arange(tokens) * 7 % 97 + torch.randint(0, 3, (tokens,), generator=generator)).int()

    tokens = {f"{split}/{play}": text(n) for split in ("train", "validation", "test") for play, n in (("a", 900), ("b", 2000))}
    save_file(tokens, folder / "tokens.safetensors")
    return Language(folder)


def test_windows_come_from_all_plays_in_turn(language):
    assert language.texts("test") == ["a", "b"]
    a, b = (language.tokens[f"test/{play}"] for play in "ab")
    first = language.windows("test", 400, 5)
    assert [w[0].item() for w in first] == [a[0], b[0], a[400], b[400], b[800]]
    everything = language.windows("test", 400)
    assert torch.equal(everything, torch.cat([a[:800].view(2, 400), b.view(5, 400)]).long())
    with pytest.raises(ValueError, match="test has 7 windows of 400 tokens, and 8 are asked for"):
        language.windows("test", 400, 8)


def test_missing_text_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"run python -m scripts\.evidence\.language first"):
        Language(tmp_path)
    (tmp_path / "hamlet_gut.txt").touch()
    with pytest.raises(ValueError, match=r"there is none of henry_v, much_ado_about_nothing, richard_iii, "):
        prepare(tmp_path / "new", gguf=tmp_path / "none.gguf", texts=tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def trainer(language) -> trained.Trainer:
    size = trained.Size(length=48, batch=4, steps=20, test=4, validation=4)
    return trained.Trainer(language, "cpu", dict.fromkeys(trained.SIZES, size))


def run(trainer, method, rate=1e-3, **options):
    return trainer(trained.Run(method=method, rate=rate, seed=options.pop("seed", 0), **options))


def test_methods_learn_what_they_are_for(trainer):
    before = trainer("main")["test"]
    found = {method: run(trainer, method) for method in ("task", "distill", "control", "mix")}
    assert found["task"] == run(trainer, "task"), "a run is reproduced by its seed"
    assert found["task"]["loss"] != run(trainer, "task", seed=1)["loss"]

    def mean(entry, name):
        return sum(entry[name]) / len(entry[name])

    loss = {method: mean(entry["test"], "loss_nvfp4") for method, entry in found.items()}
    kl = {method: mean(entry["test"], "kl_nvfp4") for method, entry in found.items()}
    for method in ("task", "control", "mix"):
        assert loss[method] < mean(before, "loss_nvfp4") - 0.2
    assert kl["distill"] < 0.5 * kl["mix"] < 0.5 * kl["task"]
    # The loss of a step is that of the method, and the first one is that of the starting model.
    assert found["task"]["loss"][0] > 4 and found["distill"]["loss"][0] < 0.1
    assert found["mix"]["loss"][0] == pytest.approx((found["task"]["loss"][0] + found["distill"]["loss"][0]) / 2, rel=1e-3)
    assert found["control"]["loss"][0] != found["task"]["loss"][0], "controls train through original attention"
    assert [point["step"] for point in found["task"]["curve"]] == [0, 5, 10, 15, 20]
    # Nothing was learned yet, so that in original attention the distance is none.
    assert found["task"]["curve"][0]["kl_original"] == 0 < found["task"]["curve"][0]["kl_nvfp4"]
    assert {f"loss_{option}" for option in trained.OPTIONS} < found["control"]["test"].keys()
    assert trainer.start.get_input_embeddings().weight.grad is None


def test_lora_trains_adapters_alone(trainer, monkeypatch):
    seen = []
    fine_tune = trained.fine_tune
    monkeypatch.setattr(trained, "fine_tune", lambda model, *a, **k: (seen.append(model), fine_tune(model, *a, **k))[1])
    entry = run(trainer, "task", weights="lora", option=trained.ALL, rate=1e-2)
    trainable = {name for name, parameter in seen[0].named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert sum(entry["test"][f"loss_{trained.ALL}"]) < sum(trainer("main")["test"][f"loss_{trained.ALL}"]) - 0.1


def test_a_sweep_ends_when_both_neighbours_are_worse():
    best, entries = {"distill": 1e-5, "task": 1e-4, "control": 1e-3}, {}

    def entry(run):
        distance = abs(torch.tensor(run.rate / best.get(run.method, 1e-4)).log().item())
        return {"curve": [{"loss_nvfp4": distance, "loss_original": distance, "kl_nvfp4": distance, "kl_original": distance}]}

    order = []
    while (unit := next(((key, unit) for key, unit in trained.plan(entries) if key not in entries), None)) is not None:
        entries[unit[0]] = {} if isinstance(unit[1], str) else entry(unit[1])
        order.append(unit)
    for method, rate in best.items():
        assert trained.best_rate(entries, method, "full") == rate
    assert set(trained.tried_rates(entries, "distill", "full")) == {3e-6, 1e-5, 3e-5, 1e-4}
    assert set(trained.tried_rates(entries, "control", "full")) == {3e-5, 1e-4, 3e-4, 1e-3}, "the grid ends"
    runs = [unit for _, unit in order if isinstance(unit, trained.Run)]
    # Beyond the sweep, which is of the main size with the first seed, all runs have the chosen rate.
    assert {r.rate for r in runs if r.method == "distill" and r.weights == "full" and (r.seed or r.size != "main")} == {1e-5}
    assert len({key for key, _ in order}) == len(order)
    entries[trained.Run(method="task", rate=1e-4, seed=0).key]["curve"][-1]["loss_nvfp4"] = float("nan")
    assert trained.best_rate(entries, "task", "full") != 1e-4, "what diverged is never the best"


def test_ablated_gradients_differ_where_they_should(language):
    found = ablations.Ablations(language, "cpu", {})(ablations.Gradients(length=128, window=1))
    layers, whole = found["layers"], found["whole"]
    for tensor in ("dq", "dk", "dv"):
        assert layers["definition"][tensor] == {"relative_l2": [0.0] * 2, "cosine": [1.0] * 2, "norm_ratio": [1.0] * 2}
        wrong = {name for name in layers if min(layers[name][tensor]["relative_l2"]) > 1e-3}
        only_dv = {"p_unquantized_in_dv", "normalized_p_backward", "public_training"}
        assert wrong == (only_dv if tensor == "dv" else {"d_from_o"})
    assert whole["definition"]["relative_l2"] == 0
    assert all(1e-3 < whole[name]["relative_l2"] < 0.5 for name in whole if name != "definition")


def test_differences_of_gradients():
    exact = torch.tensor([3.0, 4.0])
    assert ablations.difference(exact / 2, exact) == {"relative_l2": 0.5, "cosine": 1.0, "norm_ratio": 0.5}
    assert ablations.difference(torch.tensor([4.0, -3.0]), exact)["cosine"] == 0


def test_arms_are_trained_and_served_as_they_say(language):
    size = ablations.Size(length=48, batch=2, steps=4, test=2, validation=2)
    measure = ablations.Ablations(language, "cpu", {"512": size})
    ours, pair, control = (
        measure(ablations.Run(arm=arm, size="512", seed=0)) for arm in ("definition", "public_pair", "control")
    )
    assert "loss_served" not in ours["test"] and "loss_trained" not in control["test"]
    before = {name: entry["curve"][0] for name, entry in (("ours", ours), ("pair", pair), ("control", control))}
    assert before["control"]["loss_served"] == before["ours"]["loss_trained"], "all begin with the same model"
    assert len({before["pair"][f"loss_{name}"] for name in ("original", "trained", "served")}) == 3
    assert ours["loss"][0] != pair["loss"][0] != control["loss"][0] and len(ours["grad_norm"]) == 4


def test_what_is_served_is_what_was_trained(language, tmp_path):
    server = serve.Server(language, "cpu", serve.Size(length=48, batch=2, steps=4, windows=3, decoded=20))
    results = Results(tmp_path / "serve.json")
    work_through(results, partial(serve.plan, "cpu"), lambda: server, device="cpu")
    assert set(results) == {f"{name}/float32" for name in (trained.PLAIN, trained.ALL)}
    for entry in results.values():
        training = entry["windows"]["training"]["loss"]
        assert entry["windows"]["reloaded"]["loss"] == training == entry["windows"]["eager"]["loss"]
        ends = entry["ends"]
        assert ends["cache"]["loss"] == pytest.approx(ends["training"]["loss"], rel=1e-4)
        assert max(ends["cache"]["kl"]) < 1e-4 and ends["training"]["loss"] != training

"""What TRL's trainers need to run, in small: a tokenizer with a chat template, a model, data of each kind."""

import datasets
from transformers import AutoModelForCausalLM

from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import byte_tokenizer, words

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<end>{% endgeneration %}"
    "{% else %}{{ message.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ARGUMENTS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False}
# Nothing is reported nor saved unless a test says so.
ARGUMENTS |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(folder, **overrides):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 16, "tie_word_embeddings": True}
    tiny_qwen3(**sizes | {"eos_token_id": tokenizer.eos_token_id} | overrides).save_pretrained(folder)


def load(folder, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def texts(count=12):
    return datasets.Dataset.from_list([{"text": words(3 + number % 7, seed=number)} for number in range(count)])


def conversations(count=12):
    def messages(number):
        said = {"user": words(3, seed=number), "assistant": words(4 + number % 3, seed=number + 50)}
        return [{"role": role, "content": content} for role, content in said.items()]

    return datasets.Dataset.from_list([{"messages": messages(number)} for number in range(count)])


def preferences(count=8):
    columns = {"prompt": (3, 0), "chosen": (4, 100), "rejected": (5, 200)}
    rows = [{name: words(n, seed=seed + number) for name, (n, seed) in columns.items()} for number in range(count)]
    return datasets.Dataset.from_list(rows)


def prompts(count=8):
    return datasets.Dataset.from_list([{"prompt": words(1 + number % 3, seed=number)} for number in range(count)])


def count_letters(completions, **columns):
    """A reward."""
    return [float(len(set(completion))) for completion in completions]

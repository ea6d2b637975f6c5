"""The program of a child process, which a wrong kernel may take down: are the kernels for inference right and faster on this GPU?

    python -m qat_kernels.self_check '{"device": "cuda:0", "cases": [{"head_dim": 128, "causal": false, ...}]}'

It prints a line of JSON for each case as soon as that is decided, so that whoever started it knows which one took it down.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from qat_kernels.verdicts import Case

from .check import decided, first_line
from .identity import identity, of_kernel


def main(arguments: list[str]) -> None:
    """Check every case of the request, one after the other."""
    request = json.loads(arguments[0])
    device, cases = torch.device(request["device"]), request["cases"]
    try:
        about = identity(device)
    except Exception as error:  # no driver, no such GPU, or no room for a context
        for each in cases:
            _say({"case": each, "state": "none", "reason": f"no context on {device}: {first_line(error)}"})
        return
    for each in cases:
        case = Case.from_dict(each)
        # Before it runs: what is there now is what is checked.
        about_case = about | of_kernel(case.kernel)
        result, may_go_on = decided(case, device)
        _say({"case": each, "identity": about_case} | result)
        if not may_go_on:
            sys.exit(1)  # after an exception the state of the GPU is unknown


def _say(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The operators' tests run twice: on the PyTorch twins, and, in a process of their own, on the Triton kernels.

Triton's interpreter must be chosen before triton is first imported. So with ``TRITON_INTERPRET=1`` in the environment
the fixture `backend` is "triton", and test_under_interpreter.py starts these same files again in such a process.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@pytest.fixture
def backend() -> str:
    return "triton" if INTERPRETED else "torch"

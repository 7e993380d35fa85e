"""What a run computes with: errors before the first step, the table, the optimizer's implementation, apex and its
namesake."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "modules"))
import te_stand_in

from nemo_slam import allowlist, apex_package
from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.training import precision
from nemo_slam.training.optimizers import FastestAdamW, implementation
from nemo_slam.training.precision import check_run
from slam_kernels import BackendError

CONF = Path(__file__).resolve().parents[2] / "conf"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def check(device=CPU, trainer="32-true", optimizer="auto", multiple=128, **changes):
    small = {"d_model": 128, "d_ff": 64, "n_heads": 1, "conv_norm_groups": 4, "kernels": "torch"}
    config = ConformerConfig(**{**small, **changes})
    return dict(check_run(ConformerStack(config, 1), config, multiple, optimizer, trainer, device))


def test_rows_on_a_cpu():
    rows = check(activation_checkpointing=True, compile=False)
    assert rows["precision"] == "32-true"
    assert rows["attention"] == "sdpa (attention: auto)"
    assert rows["layers"] == "checkpointed"
    assert rows["optimizer"] == "torch AdamW (optim: auto)"
    assert check(trainer="bf16-mixed")["precision"] == "bf16-mixed; float32 weights"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fp8": "gemm"}, ValueError, "fp8=gemm goes with trainer.precision=bf16-mixed .* not 32-true"),
        ({"fp8": "gemm", "trainer": "bf16-true"}, ValueError, "not bf16-true"),
        ({"trainer": "bf16-true"}, ValueError, "precision=bf16-true would also round the waveform.*use bf16-mixed"),
        ({"trainer": "16-true"}, ValueError, "precision=16-true would also round the waveform.*use bf16-mixed"),
        ({"fp8": "gemm", "trainer": "bf16-mixed", "multiple": 24}, ValueError, "pad_multiple to be a multiple of 16"),
        ({"fp8": "gemm", "trainer": "bf16-mixed"}, BackendError, "fp8=gemm on cpu"),
        ({"fp8": "attention", "trainer": "bf16-mixed"}, BackendError, "fp8=attention on cpu"),
        ({"attention": "te"}, BackendError, "attention=te on cpu"),
        ({"attention": "varlen"}, BackendError, "attention=varlen on cpu"),
        ({"kernels": "triton"}, BackendError, "kernels=triton"),
        ({"optimizer": "fused_adam"}, ValueError, "needs NVIDIA's apex"),
    ],
)
def test_what_a_cpu_cannot_do_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        check(**arguments)


def test_a_run_refuses_before_its_first_step(pretrain_config, tmp_path):
    """Through the front door: nothing is trained and no checkpoint written."""
    from nemo_slam.training.pretrain import pretrain

    cfg = pretrain_config(1, "model.conformer.attention=te", "name=refused")
    with pytest.raises(BackendError, match="attention=te on cpu: Transformer Engine needs an NVIDIA GPU"):
        pretrain(cfg)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_run_in_double_precision(pretrain_config):
    """Lightning casts every batch to it, the waveform too."""
    from nemo_slam.training.pretrain import pretrain

    folder = pretrain(pretrain_config(2, "name=double", "trainer.precision=64-true", "trainer.max_steps=1"))
    state = torch.load(folder / "checkpoints/step_000000001.ckpt", weights_only=False)["state_dict"]
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float64}
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.fixture
def tried(monkeypatch):
    """The stand-in with the start-up trial, on the CPU."""
    te_stand_in.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield sys.modules["transformer_engine.pytorch.attention.dot_product_attention"]._attention_backends
    te_stand_in.clear_caches()


def test_the_trial_names_what_transformer_engine_chose(tried):
    rows = check(trainer="bf16-mixed", fp8="attention")
    assert rows["precision"] == "bf16-mixed; float32 weights; FP8: attention"
    assert rows["attention"] == "te: FusedAttention (NVTE_FP8) (attention: auto)"


def test_the_trial_refuses_attention_that_is_not_fp8(tried):
    tried["fused_attention_backend"] = "NVTE_F16_arbitrary_seqlen"
    with pytest.raises(BackendError, match=r"chose FusedAttention .*F16.*not FP8 attention"):
        check(trainer="bf16-mixed", fp8="attention")


def test_the_trial_tells_why_it_failed(tried, monkeypatch):
    def fail(self, *arguments, **options):
        raise ValueError("No dot product attention backend is available")

    monkeypatch.setattr(te_stand_in.DotProductAttention, "forward", fail)
    with pytest.raises(BackendError, match=r"ValueError: No dot product attention backend.*NVTE_DEBUG"):
        check(trainer="bf16-mixed", fp8="attention")


def test_the_trial_draws_no_random_number(tried):
    layer = ConformerStack(ConformerConfig(d_model=128, n_heads=1, conv_norm_groups=4, fp8="attention"), 1)[0]
    before = torch.get_rng_state()
    precision.try_transformer_engine(layer, 128, CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


# ---- optimizer and apex --------------------------------------------------------------------------


def forget_apex() -> None:
    for name in [name for name in sys.modules if name == "apex" or name.startswith("apex.")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_apex_is_left():
    """Importing is not undone by ``monkeypatch``."""
    yield
    forget_apex()


def install_apex(folder: Path, monkeypatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    forget_apex()


FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    # Interface and state of NVIDIA's: steps are counted once a group.
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        assert adam_w_mode

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                m, v = m / (1 - b1 ** group["step"]), v / (1 - b2 ** group["step"])
                p.data.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / (v.sqrt() + group["eps"]))
"""
NVIDIA = {"__init__.py": "", "optimizers/__init__.py": FUSED_ADAM}
TOOLKIT = {"__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig", "amp/__init__.py": ""}


def test_no_apex():
    assert apex_package.find() is None
    apex_package.refuse_other()
    assert implementation("auto", GPU) == "torch AdamW, fused"
    assert implementation("adamw", GPU) == "torch adamw"


def test_nvidias_apex(tmp_path, monkeypatch):
    install_apex(tmp_path, monkeypatch, NVIDIA)
    assert apex_package.find() == "nvidia"
    apex_package.refuse_other()
    assert implementation("auto", GPU) == implementation("fused_adam", GPU) == "NVIDIA apex FusedAdam"
    assert implementation("auto", CPU) == "torch AdamW"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        implementation("fused_adam", CPU)
    assert implementation("auto", GPU, sharded=True) == "torch AdamW, fused"
    with pytest.raises(ValueError, match="fused_adam takes no shards"):
        implementation("fused_adam", GPU, sharded=True)
    assert "apex" not in sys.modules  # looked for, not imported


def test_the_web_toolkit_is_named(tmp_path, monkeypatch):
    install_apex(tmp_path, monkeypatch, TOOLKIT)
    assert apex_package.find() == "other"
    with pytest.raises(ImportError, match=r"not NVIDIA's apex but the web toolkit .*pip uninstall apex"):
        apex_package.refuse_other()
    with pytest.raises(ImportError, match="web toolkit"):
        _import_nemo_again(monkeypatch)
    with pytest.raises(ValueError, match=r"fused_adam: .*web toolkit"):
        implementation("fused_adam", GPU)
    assert implementation("auto", GPU) == "torch AdamW, fused"


def _import_nemo_again(monkeypatch) -> None:
    """What importing NeMo asks of our finder."""
    finder = allowlist._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    finder.find_spec(allowlist.MODULE)


def steps(optimizer, parameter, numbers):
    for k in numbers:
        parameter.grad = torch.sin(torch.arange(6.0) + k)
        optimizer.step()


@pytest.mark.parametrize("to_apex", [True, False])
def test_a_run_changes_between_apex_and_torch(tmp_path, monkeypatch, to_apex):
    """Ten steps of one are five of the other and then five of this."""
    install_apex(tmp_path, monkeypatch, NVIDIA)
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}

    def make(parameter, apex):
        monkeypatch.setattr("nemo_slam.training.optimizers._device", lambda groups: GPU if apex else CPU)
        optimizer = FastestAdamW([parameter], **options)
        assert ("Apex" in type(optimizer).__name__) == apex
        return optimizer

    weights = torch.linspace(-1, 1, 6)
    whole, first = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    steps(make(whole, False), whole, range(10))
    before = make(first, not to_apex)
    steps(before, first, range(5))
    second = torch.nn.Parameter(first.detach().clone())
    after = make(second, to_apex)
    after.load_state_dict(before.state_dict())
    steps(after, second, range(5, 10))
    torch.testing.assert_close(second, whole, rtol=1e-5, atol=1e-6)


def test_shards_are_torchs(tmp_path, monkeypatch):
    """apex's kernels read a tensor's memory, and the DTensor around a shard has none."""
    install_apex(tmp_path, monkeypatch, NVIDIA)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        shard = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        monkeypatch.setattr("nemo_slam.training.optimizers._device", lambda groups: GPU)
        monkeypatch.setattr("nemo_slam.training.optimizers.TorchAdamW", lambda groups, **options: "torch's")
        assert FastestAdamW([{"params": [torch.nn.Parameter(shard)]}]) == "torch's"
        assert "Apex" in type(FastestAdamW([torch.nn.Parameter(torch.zeros(4))])).__name__
    finally:
        dist.destroy_process_group()


def test_adamw_takes_any_iterable_and_clips_under_lightning():
    module = torch.nn.Linear(3, 2)
    optimizer = FastestAdamW(module.parameters(), lr=1e-3, betas=[0.9, 0.98])
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert optimizer._step_supports_amp_scaling is False  # Lightning refuses to clip where it is true


@pytest.mark.parametrize("size", ["slam", "base"])
def test_the_papers_optimizer_is_adam(size):
    """As NeMo makes it from the config, which names no decay: Kingma and Ba's algorithm 1, and nothing else."""
    from nemo.core.optim import get_optimizer

    options = dict(OmegaConf.load(CONF / "model" / "slam.yaml").model.optim)
    options |= dict(OmegaConf.load(CONF / "model" / f"{size}.yaml").model.optim)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    keys = {key: value for key, value in options.items() if key not in ("name", "sched")}
    optimizer = get_optimizer(options["name"])([parameter], **keys)

    theta, m, v = parameter.detach().numpy().copy(), np.zeros(6), np.zeros(6)
    for t in range(1, 31):
        gradient = np.sin(np.arange(6.0) + t) * (np.arange(6) > 1)  # two weights that no loss reaches
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        theta -= options["lr"] * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-10)
    assert parameter[:2].tolist() == torch.linspace(-1, 1, 6, dtype=torch.float64)[:2].tolist()

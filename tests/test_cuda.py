"""What the code does on a GPU alone.  Skipped without one; note 7 lists the branches.

Everything else runs the same lines on a CPU (tests/test_placement.py).
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import train_glue
from bilora import add_lora, bilora_optimizers, lora_sam_step
from model import read_safetensors
from test_steps import Net
from train_glue import METHODS, main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def command(out, *more):
    return ["--method", "bi-lora", "--seeds", "0", "--limit", "64", "--batch-size", "16",
            "--epochs", "2", "--jobs", "1", "--dropout", "0.2", "--save-every", "3", "--device",
            "cuda", "--out", str(out), *more]


def test_peak_memory_is_the_gpus(small_demos, tmp_path):
    (run,) = main(command(tmp_path, "--bf16"))["results"]
    assert 0 < run["peak_memory_bytes"] <= torch.cuda.get_device_properties(0).total_memory


def test_optimizers_use_the_fused_kernel():
    net = Net().cuda()
    add_lora(net, 2, 4, aux_rank=2)
    for optimizer in bilora_optimizers(net, 1e-3, ascent="adamw"):
        assert optimizer.defaults["fused"]


def test_both_passes_draw_the_same_masks_from_the_gpus_stream():
    net, losses = Net(p=0.5).cuda().train(), []
    add_lora(net, 2, 4)
    descent, _ = bilora_optimizers(net, 1e-3)
    x = torch.randn(8, 6, device="cuda")

    def closure():
        loss = net(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss
    lora_sam_step(descent, closure, rho=0.0)
    lora_sam_step(descent, closure, rho=0.0)
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


def test_a_resumed_run_draws_the_gpus_next_masks(small_demos, tmp_path, monkeypatch):
    main(command(tmp_path / "whole"))
    step = METHODS["bi-lora"].step

    def killed(run, closure):
        if len(run.log) == 5:
            raise KeyboardInterrupt
        return step(run, closure)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "bi-lora", METHODS["bi-lora"]._replace(step=killed))
        with pytest.raises(SystemExit):
            main(command(tmp_path / "killed"))
    main(command(tmp_path / "killed", "--resume"))
    whole, resumed = (read_safetensors(tmp_path / out / "bi-lora-seed0/adapter_model.safetensors")
                      for out in ("whole", "killed"))
    for key, tensor in whole.items():  # a GPU's sums may differ in their last bits
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_the_demo_takes_one_run_at_a_time():
    assert train_glue.JOBS == 1


def test_torch_picks_the_kernel_of_attention(small_demos, tmp_path, monkeypatch):
    seen, attention = set(), F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        seen.add(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    main(command(tmp_path, "--bf16"))
    assert seen == {True}


def test_a_batch_is_copied_while_the_host_goes_on():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a wait for the GPU is an error
    try:
        found = train_glue.pad_rows([[1, 2], [3]], 0, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert found.tolist() == [[1, 2], [3, 0]] and found.is_cuda


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_each_process_has_a_gpu_of_its_own(small_demos, small_folders, tmp_path):
    """nccl refuses two processes on one GPU.  Two equal one, but for rounding."""
    words = command(tmp_path / "two", "--dropout", "0", "--model", small_folders[0], "--data",
                    small_folders[0])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", train_glue.__file__, *words], check=True, timeout=300)
    words[words.index("--out") + 1] = str(tmp_path / "one")
    main(words)
    one, two = (read_safetensors(tmp_path / out / "bi-lora-seed0/adapter_model.safetensors")
                for out in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5, msg=key)

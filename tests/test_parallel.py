"""Two processes with half of the batch each, under DistributedDataParallel, against one process
with all of it.

DDP averages the gradients before a step sees them, so that eps, its norm F and the auxiliary pairs
agree on every rank.
"""

import torch

from bilora import bilora_step, lora_layers, lora_sam_step, primary_parameters
from test_steps import adapted, assert_close, closure_of, sgd_pair

STEPS = 3


def train(net, model, batch, method):
    """`model` is what the closure calls: net itself, or net in DDP.  Returns the adapter after some
    steps."""
    closure = closure_of(model, batch)
    for _ in range(STEPS):
        if method == "bi-lora":
            bilora_step(*sgd_pair(net), closure, lora_layers(net), 0.1)
        else:
            lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.1), closure, 0.3)
    return {name: p.detach() for name, p in net.named_parameters()}


def worker(rank, folder, batch):
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    half = tuple(t[4 * rank:4 * rank + 4] for t in batch)
    for method in ("lora-sam", "bi-lora"):
        net = adapted(aux_rank=2 if method == "bi-lora" else 0)
        model = torch.nn.parallel.DistributedDataParallel(net)
        torch.save(train(net, model, half, method), f"{folder}/{method}-{rank}.pt")
    del model
    torch.distributed.barrier()  # neither leaves while the other still uses the group
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path, batch):
    # a fork has torch imported already; but with a GPU autograd does not survive one
    start_method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(worker, (tmp_path, batch), 2, start_method=start_method)
    for method in ("lora-sam", "bi-lora"):
        net = adapted(aux_rank=2 if method == "bi-lora" else 0)
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        expected = train(net, net, batch, method)
        assert any((expected[name] - start[name]).abs().max() > 0.01 for name in start)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True)
            for name, value in expected.items():
                where = f"{method}, rank {rank}, {name}"
                assert_close(found[name], value, where, rtol=1e-9, atol=1e-12)

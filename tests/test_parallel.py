"""Several processes: the steps under torch's DistributedDataParallel, and both scripts as torchrun
starts them, against one process with all of the batch.

DDP averages the gradients before a step sees them, so that eps, its norm F and the auxiliary pairs
agree on every rank.  In the scripts each process takes a share of a batch, and the closure adds up
loss and gradients.  All of it in float64, where another order of adding up makes no difference.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed.run

import train_glue
import train_gsm8k
from bilora import bilora_step, lora_layers, lora_sam_step, primary_parameters
from model import read_safetensors
from test_model import bert
from test_steps import adapted, assert_close, closure_of, sgd_pair
from test_text_to_text import ANSWERS, golden, prompts
from test_train_glue import arguments, data_of, error_of, log_of, outcome
from train_glue import METHODS

ROOT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "notes"))
import methods  # noqa: E402

STEPS = 3
SCRIPTS = (train_glue, train_gsm8k)
ALONE = ["rop", "head-sam", "head-sam-relative", "bi-lora-head-sam"]
SHARED = [name for name in METHODS if name not in ALONE]
# Three batches, of 8, 8 and 1 rows; the share of 4 rows that two processes have takes two passes.
RUN = ["--limit", "17", "--batch-size", "8", "--micro-batch", "3", "--save-every", "2", "--seeds",
       "0", "--device", "cpu", "--jobs", "1"]


# ---------------------------------------------------------------------------------- torch's own

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


# a fork has torch imported already; but with a GPU autograd does not survive one
START = "spawn" if torch.cuda.is_available() else "fork"


def test_two_processes_equal_one(tmp_path, batch):
    torch.multiprocessing.start_processes(worker, (tmp_path, batch), 2, start_method=START)
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


# ----------------------------------------------------------------------------------- the scripts

def world(count, folder, *jobs):
    """Exit codes of `count` processes that do the jobs, (function, arguments ...) each, as torchrun
    would start them; OUT-RANK in the folder gets what each one prints.  None: it hangs."""
    context = torch.multiprocessing.get_context(START)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in jobs]
        for each in sockets:
            each.bind(("localhost", 0))
        ports = [each.getsockname()[1] for each in sockets]
    processes = [context.Process(target=process, args=(rank, count, folder, ports, jobs))
                 for rank in range(count)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return codes


def process(rank, count, folder, ports, jobs):
    out = os.open(os.path.join(folder, f"out-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    time.sleep = lambda seconds: None
    for module in SCRIPTS:
        module.RANK, module.WORLD = rank, count
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    for port, (function, *words) in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        function(*words)


def doubled(setup, args, model, auxiliary):
    found = setup(args, model, auxiliary)
    model.double()
    return found


def in_float64(*argv):
    """A command of notes/methods.py whose models and losses are of float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for name, method in METHODS.items():
            setup = partial(doubled, method.setup)
            patch.setitem(METHODS, name, method._replace(setup=setup))
        torch.set_default_dtype(torch.float64)
        try:
            methods.main([*argv])
        finally:
            torch.set_default_dtype(torch.float32)


def commands(folders, out):
    """The same runs whatever the number of processes: all methods, LoRA-GA's start, problems."""
    glue, words = (["--model", folder, "--data", folder] for folder in folders)
    few = [*RUN, "--epochs", "1", "--snapshots", "2"]
    return [["train_glue.py", *glue, *few, "--method", *SHARED, "--out", f"{out}/glue"],
            ["train_glue.py", *glue, *few, "--method", "bi-lora", "--init", "lora-ga", "--rank",
             "2", "--aux-rank", "2", "--out", f"{out}/start"],
            ["train_gsm8k.py", *words, *few, "--method", "lora", "lora-sam", "bi-lora", "esam",
             "--eval-batch-size", "3", "--max-new-tokens", "8", "--out", f"{out}/words"]]


def parts(folder):
    """What a process has of a batch's loss and gradient, and of the predictions: each of it has to
    be that of the whole."""
    if train_glue.WORLD > 1:
        torch.distributed.init_process_group("gloo")
    model = golden("t5")
    model.unused = torch.nn.Parameter(torch.zeros(2))
    data = data_of("mnli", answers=ANSWERS)
    loss = train_glue.forward_backward(arguments(), model, data, prompts())
    assert model.unused.grad is None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    rng = random.Random(0)
    rows = [([1, *rng.choices(range(4, 50), k=n), 2], [0] * (n + 2), 0) for n in range(1, 10)] * 40
    predicted = train_glue.predict(arguments(), bert(), data_of("mnli"), rows)
    found |= {"loss": loss, "predicted": predicted}
    torch.save(found, os.path.join(folder, f"parts-{train_glue.RANK}.pt"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small_folders):
    """The folder of what one process makes of it all."""
    folder = tmp_path_factory.mktemp("alone")
    for argv in commands(small_folders, folder):
        in_float64(*argv)
    parts(folder)
    return folder


def assert_same_run(found, expected):
    logs, (before, after) = [log_of(found), log_of(expected)], ["step-000000.pt", "step-000003.pt"]
    for row, other in zip(*logs, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"seconds", "scores", "predicted"}:
            assert row[key] == pytest.approx(other[key], rel=1e-6), (found, key)
    assert logs[0][-1]["scores"] == logs[1][-1]["scores"]
    metrics, others = (json.loads((run / "metrics.json").read_text()) for run in (found, expected))
    assert metrics["metrics"] == pytest.approx(others["metrics"], rel=1e-6)
    tensors, wanted = (torch.load(run / "snapshots" / after) for run in (found, expected))
    start = torch.load(expected / "snapshots" / before)
    assert any(not torch.equal(start[name], wanted[name]) for name in wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-9,
                                   msg=lambda text: f"{found}, {name}: {text}")


@pytest.mark.parametrize("count", [2, 3])
def test_the_scripts_in_several_processes_equal_one(alone, tmp_path, small_folders, count):
    jobs = [(in_float64, *argv) for argv in commands(small_folders, tmp_path)]
    codes = world(count, tmp_path, *jobs, (parts, tmp_path))
    assert codes == [0] * count, (tmp_path / "out-0").read_text() + (tmp_path / "out-1").read_text()
    runs = sorted(path.parent for path in alone.glob("*/*/metrics.json"))
    assert len(runs) == len(SHARED) + 1 + 4
    for run in runs:
        assert_same_run(tmp_path / run.relative_to(alone), run)
    for method in ("lora", "bi-lora"):
        texts = [(out / f"words/{method}-seed0/predictions.jsonl").read_text()
                 for out in (alone, tmp_path)]
        assert texts[0] == texts[1]
    expected = torch.load(alone / "parts-0.pt")
    for rank in range(count):
        found = torch.load(tmp_path / f"parts-{rank}.pt")
        assert found.keys() == expected.keys() and found["predicted"] == expected["predicted"]
        for name, value in expected.items():
            if name != "predicted":
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)
    assert "training rows" in (tmp_path / "out-0").read_text()
    assert not any((tmp_path / f"out-{rank}").read_text() for rank in range(1, count))


def dealt_out(script, *argv):
    """The command with --fsdp; the weights of the blocks are shares of them while it trains."""
    whole, found = train_glue.shard, []

    def noted(model, device):
        before = sum(p.numel() for p in model.parameters())
        whole(model, device)
        after = sum((p.to_local() if hasattr(p, "to_local") else p).numel()
                    for p in model.parameters())
        frozen = [p for p in model.parameters() if hasattr(p, "full_tensor")]
        assert frozen and not any(p.requires_grad for p in frozen)
        found.append(before - after)
    train_glue.shard = noted
    in_float64(script, *argv, "--fsdp")
    train_glue.shard = whole
    assert len(found) == 2 and min(found) > 0


@pytest.mark.parametrize("count", [2, 3])
def test_weights_dealt_out_change_nothing(alone, tmp_path, small_folders, count):
    """FSDP's two processes, and three of which one has no rows, equal one that has all weights."""
    jobs = []
    for argv in commands(small_folders, tmp_path)[::2]:
        at = argv.index("--method") + 1
        end = next(i for i in range(at, len(argv)) if argv[i].startswith("--"))
        jobs.append((dealt_out, *argv[:at], "lora-sam", "bi-lora", *argv[end:]))
    codes = world(count, tmp_path, *jobs)
    assert codes == [0] * count, (tmp_path / "out-0").read_text() + (tmp_path / "out-1").read_text()
    for name in ("glue", "words"):
        for method in ("lora-sam", "bi-lora"):
            found, expected = (out / f"{name}/{method}-seed0" for out in (tmp_path, alone))
            tensors, wanted = (read_safetensors(run / "adapter_model.safetensors")
                               for run in (found, expected))
            for key, tensor in wanted.items():
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-6, atol=1e-9, msg=key)
            assert (found / "base_fingerprint.txt").read_text() == (
                expected / "base_fingerprint.txt").read_text()
            assert log_of(found)[-1]["scores"] == log_of(expected)[-1]["scores"]
            metrics = [json.loads((run / "metrics.json").read_text())["metrics"]
                       for run in (found, expected)]
            assert metrics[1].keys() - metrics[0].keys() == ({"rise"} if name == "glue" else set())


def test_weights_are_dealt_out_to_several_processes_alone(tmp_path, small_folders, capsys):
    error = error_of(capsys, ["--fsdp", "--out", str(tmp_path)], train_glue.main)
    assert "--fsdp deals weights out to the processes of torchrun; there is one process" in error
    for words, reason in ((["--method", "full"], "--fsdp deals out frozen weights"),
                          (["--method", "rwp-full"], "this method perturbs W, which --fsdp"),
                          (["--method", "flat-lora"], "this method perturbs W, which --fsdp"),
                          (["--method", "lora", "--init", "lora-ga", "--rank", "2"],
                           "LoRA-GA needs the gradient of W0")):
        argv = commands(small_folders, tmp_path / words[1])[0]
        at = argv.index("--method")
        argv = [*argv[:at], *words, *argv[argv.index("--out"):], "--fsdp"]
        assert world(2, tmp_path, (methods.main, argv)) == [2, 2]
        assert reason in (tmp_path / "out-0").read_text()


def bi_lora(folder, out, *more):
    return [train_glue.main, ["--model", folder, "--data", folder, *RUN, "--epochs", "2",
                              "--method", "bi-lora", "--aux-lr", "0.5", "--out", str(out), *more]]


def fails(error, rank, step, main, argv):
    """The command, with an error in a forward pass of one of the processes."""
    whole, calls = train_glue.forward_backward, []

    def counted(*args):
        calls.append(1)
        if len(calls) == step and train_glue.RANK == rank:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        return whole(*args)

    train_glue.forward_backward = counted
    main(argv)


def test_killed_processes_go_on_with_the_same_bits(tmp_path, small_folders):
    """With each process's own dropout masks."""
    whole, parts = (bi_lora(small_folders[0], tmp_path / out, "--dropout", "0.2")
                    for out in ("whole", "parts"))
    assert world(2, tmp_path, whole) == [0, 0]
    assert world(2, tmp_path, (fails, None, 1, 6, *parts)) == [2, -signal.SIGKILL]
    state = torch.load(tmp_path / "parts/bi-lora-seed0/state.pt")
    assert len(state["log"]) == 4 and not torch.equal(*(own[0] for own in state["random"]))
    assert world(2, tmp_path, [parts[0], [*parts[1], "--resume"]]) == [0, 0]
    runs = [outcome(tmp_path / out / "bi-lora-seed0") for out in ("whole", "parts")]
    assert runs[0] == runs[1]


def glue_in_float64(argv):
    in_float64("train_glue.py", *argv)


def test_another_number_of_processes_goes_on(tmp_path, small_folders):
    """Two, then one, then three."""
    whole, parts = (bi_lora(small_folders[0], tmp_path / out)[1] for out in ("whole", "parts"))
    glue_in_float64(whole)
    resumed = [*parts, "--resume"]
    assert world(2, tmp_path, (fails, None, 0, 4, glue_in_float64, parts)) == [-signal.SIGKILL, 2]
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glue, "forward_backward", train_glue.forward_backward)
        fails(KeyboardInterrupt(), 0, 2, glue_in_float64, resumed)
    assert len(torch.load(tmp_path / "parts/bi-lora-seed0/state.pt")["log"]) == 4
    assert world(3, tmp_path, [glue_in_float64, resumed]) == [0] * 3
    runs = [tmp_path / out / "bi-lora-seed0" for out in ("whole", "parts")]
    losses = [[row["loss"] for row in log_of(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected, found = (read_safetensors(run / "adapter_model.safetensors") for run in runs)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all(tmp_path, small_folders, rank):
    run = bi_lora(small_folders[0], tmp_path / "out")
    assert world(2, tmp_path, (fails, OSError("no room"), rank, 2, *run)) == [2, 2]
    said = [(tmp_path / f"out-{i}").read_text().splitlines()[-1] for i in (rank, 1 - rank)]
    assert said[0].endswith("error: bi-lora, seed 0: no room") and "Connection" in said[1]


def moved(folder):
    """One number of one process is the next one."""
    torch.distributed.init_process_group("gloo")
    model = bert()
    train_glue.require_one_model(model)
    with torch.no_grad():
        if train_glue.RANK == 1:
            bias = model.encoder.blocks[1].attention.q.bias
            bias[3] = torch.nextafter(bias[3], bias[3] + 1)
    with pytest.raises(ValueError, match="^encoder.blocks.1.attention.q.bias of process 1 is not "):
        train_glue.require_one_model(model)


def test_processes_with_different_weights_are_refused(tmp_path):
    assert world(3, tmp_path, (moved, tmp_path)) == [0] * 3, (tmp_path / "out-0").read_text()


def drifts(main, argv):
    """The second process moves a bias of its own."""
    step = METHODS["bi-lora"].step

    def drifting(run, closure):
        logged = step(run, closure)
        run.model.classifier.bias.data.add_(train_glue.RANK)
        return logged

    METHODS["bi-lora"] = METHODS["bi-lora"]._replace(step=drifting)
    main(argv)


@pytest.mark.parametrize("every", ["2", "100"])
def test_no_state_or_run_of_different_weights_is_saved(tmp_path, small_folders, every):
    run = bi_lora(small_folders[0], tmp_path / "out", "--save-every", every)
    assert world(2, tmp_path, (drifts, *run)) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"out-{rank}").read_text()
        assert "seed 0: classifier.bias of process 1 is not that of process 0" in said
    assert os.listdir(tmp_path / "out/bi-lora-seed0") == ["config.json"]


@pytest.mark.parametrize("name", ALONE)
def test_what_needs_the_whole_batch_is_refused(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_glue, "WORLD", 2)
    error = error_of(capsys, ["train_glue.py", "--method", "lora", name], methods.main)
    assert f"--method {name} reads the rows of a batch; expected one process, not 2" in error
    assert not os.listdir(tmp_path)


def test_runs_side_by_side_are_those_of_one_process(monkeypatch, capsys):
    assert methods.parse(train_glue, ["--jobs", "7"])[0].jobs == 7
    monkeypatch.setattr(train_glue, "WORLD", 2)
    assert methods.parse(train_glue, [])[0].jobs == 1  # the demo's default is the cores
    error = error_of(capsys, ["--jobs", "7"], partial(methods.parse, train_glue))
    assert "--jobs is 7; expected 1 beside 2 processes" in error
    error = error_of(capsys, ["--device", "cuda:0"], partial(methods.parse, train_glue))
    assert "--device cuda:0 is one device; expected cuda beside 2 processes" in error


def torchrun(out, *argv):
    """The program itself, in a fork or a new interpreter; its processes are new interpreters."""
    os.setsid()  # a group of its own, to be killed with them
    with open(out, "w") as file:
        for end in (1, 2):
            os.dup2(file.fileno(), end)
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", *argv])


def test_torchrun(tmp_path, small_folders):
    """The first process prints and writes, and an error ends it all."""
    script = os.path.join(ROOT, "train_glue.py")
    argv = [script, *bi_lora(small_folders[0], tmp_path / "out")[1]]
    codes, said = [], []
    for out in (tmp_path / "first", tmp_path / "second"):
        program = torch.multiprocessing.get_context(START).Process(
            target=torchrun, args=(out, *argv))
        program.start()
        program.join(200)
        codes.append(program.exitcode)
        if program.exitcode is None:
            os.killpg(program.pid, signal.SIGKILL)
        program.join()
        said.append(out.read_text())
    assert codes == [0, 1], said
    assert said[0].count("training rows") == said[0].count("Table: ") == 1
    assert said[1].count("error: ") == 1 and "1 of these runs are finished" in said[1]

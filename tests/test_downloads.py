"""Downloads from a server on this machine: a model from a hub, through HF_ENDPOINT, and GLUE's
archives.  What is broken leaves nothing that a next run would take for whole.
"""

import hashlib
import http.server
import importlib
import io
import json
import os
import shutil
import threading
import time
import zipfile
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import train_glue
from model import (Transformer, load_tokenizer, local_folder, read_safetensors,
                   write_safetensors)
from test_train_glue import MRPC, error_of
from train_glue import TASKS, read_tsv

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
COMMIT = "0123456789" * 4


def sha1(data):
    return hashlib.sha1(data).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves files; as a hub, the repositories it is given: {id: {file name: bytes}}.  Notes what
    was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.repositories, self.short, self.garbled, self.asked = {}, {}, set(), (), []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0].lstrip("/")
        server.asked.append((self.command, path, self.headers.get("Authorization")))
        parts = path.split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = server.repositories.get(name)
        if path.endswith(server.garbled):
            return self.wfile.write(b"no status line\r\n\r\n")
        if path in server.files:
            return self.answer(server.files[path])
        if name == "org/gated" and self.headers.get("Authorization") != "Bearer secret":
            return self.fail(401, "GatedRepo", "Access is restricted")
        if repository is None:
            return self.fail(401 if parts[0] == "api" else 404, "RepoNotFound")
        if parts[0] == "api" and parts[4] == "revision":
            if parts[5] not in ("main", "v2"):
                return self.fail(404, "RevisionNotFound")
            files = [{"rfilename": file} for file in repository]
            return self.json({"id": name, "sha": COMMIT, "siblings": files})
        if parts[0] == "api" and parts[4] == "tree":
            return self.json([{"type": "file", "path": file, "size": len(data), "oid": sha1(data)}
                              for file, data in repository.items()])
        if parts[2] == "resolve" and parts[4] in repository:
            data = repository[parts[4]]
            headers = {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": COMMIT}
            return self.answer(data, headers=headers)
        self.fail(404, "EntryNotFound")

    do_HEAD = do_GET

    def fail(self, status, code, message=""):
        self.answer(b"", status, {"X-Error-Code": code, "X-Error-Message": message})

    def json(self, value):
        self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def answer(self, data, status=200, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            cut = self.path.partition("?")[0].rpartition("/")[2] in self.server.short
            self.wfile.write(data[:len(data) // 2] if cut else data)
            self.close_connection = cut

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    served = Server()
    yield served
    served.shutdown()
    served.server_close()


# ------------------------------------------------------------------------------------------ the hub


def checkpoint(family):
    """{file name: bytes} of a tiny checkpoint with a tokenizer, and a file that nobody needs."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    files = {"tokenizer.json": tokenizer.to_str().encode(), "flax_model.msgpack": b"unread"}
    for name in ("config.json", "model.safetensors"):
        with open(os.path.join(GOLDEN, family, name), "rb") as file:
            files[name] = file.read()
    return files


def pickled(files):
    """The same repository, with the weights as torch.save writes them and BERT's list of words for
    a tokenizer."""
    path = os.path.join(GOLDEN, "bert", "model.safetensors")
    buffer = io.BytesIO()
    torch.save({key: tensor.clone() for key, tensor in read_safetensors(path).items()}, buffer)
    words = "".join(word + "\n" for word in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef"])
    return {"config.json": files["config.json"], "pytorch_model.bin": buffer.getvalue(),
            "vocab.txt": words.encode()}


def sharded(files, scratch):
    """The same repository, its weights in two files and an index."""
    tensors = read_safetensors(os.path.join(GOLDEN, "bert", "model.safetensors"))
    parts = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    out = {name: data for name, data in files.items() if name != "model.safetensors"}
    for name, keys in parts.items():
        write_safetensors(scratch / name, {key: tensors[key] for key in keys})
        out[name] = (scratch / name).read_bytes()
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    return {**out, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def hub(tmp_path, server):
    """The hub's client reads its variables when it is imported: hub(NAME=value) sets some and has
    it read them again.  From the beginning on it knows this server and an empty cache."""
    def read(**variables):
        for name, value in variables.items():
            patch.setenv(name, value)
        importlib.reload(huggingface_hub.constants)

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        patch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
        read(HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=server.address,
             HF_HUB_DISABLE_TELEMETRY="1")
        yield read
    read()


def total(name, **settings):
    """(sum of all parameters, number of words) of a model."""
    tokenizer = load_tokenizer(name, settings.get("revision"))
    model = Transformer.from_pretrained(name, **settings)
    return sum(p.double().sum().item() for p in model.parameters()), tokenizer.get_vocab_size()


def refused(name, **settings):
    """The one line of the error, which names the model and both ways out."""
    with pytest.raises(ValueError) as caught:
        total(name, **settings)
    error = str(caught.value)
    assert error.startswith(f"{name}: no such folder, and not available from the hub (")
    assert error.endswith("); give a folder that has the model's files, or the id of a model on "
                          "the hub and a connection") and "\n" not in error
    return error


def test_models_from_a_hub(tmp_path, server, hub, capsys):
    bert = checkpoint("bert")
    server.repositories = {
        "org/bert": bert, "org/pickled": pickled(bert), "org/gated": checkpoint("llama3"),
        "org/sharded": sharded(bert, tmp_path)}
    hub(HF_TOKEN="secret")
    found = [total(name) for name in ("org/bert", "org/pickled", "org/gated", "org/sharded")]
    progress, sums = capsys.readouterr().err, {}
    for family in ("bert", "llama3"):
        tensors = read_safetensors(os.path.join(GOLDEN, family, "model.safetensors"))
        sums[family] = sum(t.double().sum().item() for name, t in tensors.items()
                           if not name.startswith(("classifier", "bert.pooler")))
    expected = [sums["bert"], sums["bert"], sums["llama3"], sums["bert"]]
    assert [number for number, _ in found] == pytest.approx(expected, abs=1e-4)
    assert [words for _, words in found] == [8, 10, 8, 8]
    asked = {path.rpartition("/")[2] for method, path, _ in server.asked
             if method == "GET" and "/resolve/" in path}
    assert asked == {
        "config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "pytorch_model.bin",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors"}
    assert ("GET", "api/models/org/gated/revision/main", "Bearer secret") in server.asked
    assert "Fetching" in progress or "ownload" in progress

    hub(HF_HUB_OFFLINE="1")
    before = len(server.asked)
    assert total("org/bert") == found[0]
    error = error_of(capsys, ["--task", "mrpc", "--data", str(tmp_path), "--model", "org/bert",
                              "--max-length", "9", "--rank", "2"])
    assert str(tmp_path / "train.tsv") in error
    assert len(server.asked) == before  # the cache, without a word to the server


def test_what_stands_beside_the_weights_comes_from_the_hub_too(server, hub):
    """And no weights of another format, nor any where only the tokenizer is asked for."""
    beside = ["generation_config.json", "chat_template.jinja", "tokenizer.model", "LICENSE",
              "README.md", "merges.txt"]
    weights = ["pytorch_model.bin", "model.onnx", "tf_model.h5", "model.gguf",
               "original/consolidated.00.pth"]
    server.repositories = {"org/llama": {**checkpoint("llama3"), **dict.fromkeys(beside, b"{}"),
                                         **dict.fromkeys(weights, b"unread")}}
    without = {*beside, "config.json", "tokenizer.json"}
    assert {*os.listdir(local_folder("org/llama", weights=False))} == without
    assert {*os.listdir(local_folder("org/llama"))} == without | {"model.safetensors"}


def test_what_a_hub_does_not_give(tmp_path, server, hub):
    server.repositories = {"org/bert": checkpoint("bert"), "org/gated": checkpoint("llama3"),
                           "org/cut": checkpoint("bert")}
    server.short = {"model.safetensors"}
    for name, settings, reason in (
            ("org/gated", {}, "restricted"), ("org/none", {}, "Repository Not Found"),
            ("org/bert", {"revision": "gone"}, "Revision Not Found"), ("org/cut", {}, ""),
            ("a/b/c", {}, "Repo id must be in the form 'repo_name' or 'namespace/repo_name'")):
        assert reason in refused(name, **settings)
    server.short.clear()
    found = total("org/bert")
    assert total("org/cut", revision="v2") == found and found[0] > 0  # the broken half was not kept
    server.server_close()
    hub(HF_HOME=str(tmp_path / "empty"))
    refused("org/bert")


# ------------------------------------------------------------------------------------------ GLUE


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, text in members.items():
            out.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def glue(tmp_path, monkeypatch, server):
    """A server with the archive of CoLA and the two files of MRPC, and their checksums in the
    script's tables."""
    cola = archive({"CoLA/": "", "CoLA/train.tsv": "a\t1\t\tgood one\n",
                    "CoLA/dev.tsv": "a\t0\t*\tone bad\n", "CoLA/test.tsv": "",
                    "CoLA/original/raw/dev.tsv": "wrong", "__MACOSX/CoLA/._dev.tsv": "wrong"})
    corpus = "\ufeff" + MRPC.replace("\n", "\r\n") + "".join(
        f"{i % 2}\t{i}\t{i + 10}\tsentence {i}\tother \u201c{i}\r\n" for i in range(6))
    server.files = {"CoLA.zip": cola, "msr_paraphrase_train.txt": corpus.encode(),
                    "dev_ids.tsv": b"2\t12\n5\t15\n3\t99\n"}
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in server.files.items()}
    monkeypatch.setattr(train_glue, "GLUE", server.address + "/")
    monkeypatch.setattr(train_glue, "ZIPS", {"cola": ("CoLA.zip", sha256["CoLA.zip"])})
    monkeypatch.setattr(train_glue, "MRPC", {
        part: (f"{server.address}/{name}", sha256[name])
        for part, name in (("pairs", "msr_paraphrase_train.txt"), ("ids", "dev_ids.tsv"))})
    monkeypatch.setenv("BILORA_CACHE", str(tmp_path / "cache"))
    return server


def downloaded(name):
    """The folder of the task, and [rows of train.tsv, rows of dev.tsv]."""
    folder = train_glue.data_folder(SimpleNamespace(task=name, data=None), TASKS[name])
    paths = [os.path.join(folder, file) for file in ("train.tsv", "dev.tsv")]
    return folder, [read_tsv(TASKS[name], path) for path in paths]


def test_glue_is_downloaded_once(tmp_path, glue, capsys):
    folder, rows = downloaded("cola")
    assert folder == str(tmp_path / "cache/glue/CoLA")
    assert rows == [[(("good one",), 1)], [(("one bad",), 0)]]
    assert "100%" in capsys.readouterr().err  # a progress bar
    asked = len(glue.asked)
    assert downloaded("cola") == (folder, rows) and len(glue.asked) == asked
    assert os.listdir(tmp_path / "cache/glue") == ["CoLA"]


def test_mrpc_is_put_together(glue):
    """The development set is the pairs whose two ids stand in one line."""
    _, (train, dev) = downloaded("mrpc")
    assert dev == [(("sentence 2", "other \u201c2"), 0), (("sentence 5", "other \u201c5"), 1)]
    assert [text[0] for text, _ in train] == [f"sentence {i}" for i in (0, 1, 3, 4)]


@pytest.mark.skipif("GLUE_DATA" not in os.environ, reason="GLUE_DATA is no folder of GLUE's files")
def test_mrpc_split_of_the_real_rows(tmp_path):
    """GLUE's two files, thrown together and split again."""
    real = {}
    for name in ("train.tsv", "dev.tsv"):
        with open(os.path.join(os.environ["GLUE_DATA"], "MRPC", name), "rb") as file:
            real[name] = file.read().splitlines(True)
    ids = [b"\t".join(row.split(b"\t")[1:3]) + b"\n" for row in real["dev.tsv"][1:]]
    (tmp_path / "ids").write_bytes(b"".join(ids))
    (tmp_path / "pairs").write_bytes(b"".join([*real["train.tsv"], *real["dev.tsv"][1:]]))
    train_glue.split_mrpc(str(tmp_path), str(tmp_path / "MRPC"))
    assert len(ids) == 408
    for name, rows in real.items():
        assert (tmp_path / "MRPC" / name).read_bytes().splitlines(True)[1:] == rows[1:]


@pytest.mark.parametrize("damage, message", [
    ("cut", "invalid hash value"), ("changed", "invalid hash value"), ("gone", "404"),
    ("garbled", "no status line")])
def test_broken_downloads_leave_nothing(tmp_path, glue, monkeypatch, damage, message):
    with monkeypatch.context() as patch:
        if damage == "cut":
            patch.setattr(glue, "short", {"dev_ids.tsv", "CoLA.zip"})
        elif damage == "garbled":
            patch.setattr(glue, "garbled", ("dev_ids.tsv", "CoLA.zip"))
        elif damage == "gone":
            patch.setattr(glue, "files", {})
        else:
            changed = {name: data[:-1] + b"?" for name, data in glue.files.items()}
            patch.setattr(glue, "files", changed)
        for name in ("cola", "mrpc"):
            with pytest.raises(ValueError, match=f"^{glue.address}/.*{message}.*--data$"):
                downloaded(name)
            assert not os.listdir(tmp_path / "cache/glue")
    assert len(downloaded("mrpc")[1][1]) == 2


def test_an_interrupted_download_leaves_nothing(tmp_path, glue, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_glue.shutil, "unpack_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        downloaded("cola")
    assert not os.listdir(tmp_path / "cache/glue")


def test_a_run_without_data_and_without_network(tmp_path, glue, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, data in checkpoint("bert").items():
        (tmp_path / name).write_bytes(data)
    run = ["--task", "cola", "--model", ".", "--rank", "2", "--aux-rank", "2", "--max-length", "9",
           "--epochs", "1", "--seeds", "0", "--device", "cpu"]
    (result,) = train_glue.main([*run, "--method", "lora"])["results"]
    assert result["metrics"]["accuracy"] in (0.0, 1.0)
    shutil.rmtree(tmp_path / "cache")
    glue.server_close()
    capsys.readouterr()
    error = error_of(capsys, run)
    assert "CoLA.zip: " in error and "--data" in error


def test_the_table_of_downloads():
    files = [*train_glue.ZIPS.values(), *train_glue.MRPC.values()]
    assert all(len(bytes.fromhex(sha256)) == 32 for _, sha256 in files)
    assert train_glue.GLUE.startswith("https://")
    assert all(address.startswith("https://") for address, _ in train_glue.MRPC.values())
    assert train_glue.ZIPS.keys() == TASKS.keys() - {"demo", "mrpc"}


@pytest.mark.parametrize("cache, folder", [
    ("/elsewhere", "/elsewhere/glue/RTE"), (None, "/home/somebody/.cache/bilora/glue/RTE")])
def test_where_the_cache_is(monkeypatch, cache, folder):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("BILORA_CACHE", raising=False)
    if cache:
        monkeypatch.setenv("BILORA_CACHE", cache)
    monkeypatch.setattr(train_glue.os.path, "isdir", lambda path: path == folder)
    assert train_glue.data_folder(SimpleNamespace(task="rte", data=None), TASKS["rte"]) == folder

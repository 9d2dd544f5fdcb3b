"""The GSM8K script: answers, files, the loss of the answers, what is generated, runs.

Oracles: a table of answers written by hand; the model's own log-probabilities token by token; a run
that nothing interrupted; the real files' rows and answers (with GSM8K_DATA set).
"""

import hashlib
import json
import math
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import train_glue
import train_gsm8k
from bilora import add_lora, load_adapter
from model import Transformer, read_safetensors
from test_train_glue import ADAPTER, PAPERS, error_of, log_of, losses, outcome
from train_gsm8k import (encode, extract_answer, forward_backward, is_right, json_array, main,
                         metamath_rows, read_jsonl, read_metamath)

HERE = os.path.dirname(os.path.abspath(__file__))

# ------------------------------------------------------------------------------------------ answers

NINES = "9" * 60


@pytest.mark.parametrize("text, strict, flexible", [
    ("... so 70,000.\n#### 70,000", "70000", "70000"), ("#### $29.00", "29.00", "29.00"),
    ("It is 72.\n#### 72.", "72", "72"), ("#### -5", "-5", "-5"), ("10-5", None, "5"),
    ("#### ,", None, None), ("#### none, 3 left", None, "3"), ("", None, None),
    ("no marker 12 but 13", None, "13"), ("####1,234,567", "1234567", "1234567"),
    ("#### 5 apples\n#### 6", "5", "6"), ("#### 3.5", "3.5", "3.5"), ("-$5", None, "-5"),
    ("a lone $ and #### $", None, None), ("#### \n 4", "4", "4"), ("#### -$5", "-5", "-5"),
    ("#### $-5", "-5", "-5"), ("#### $1,000,000", "1000000", "1000000"), ("####72####", "72", "72"),
    ("#### 1/2", None, None), ("#### .5", ".5", ".5"), ("(3,4)", None, "4"),
    ("x = \u22125", None, "-5"), ("20 -3", None, "3"), ("#### **5**", "5", "5"),
    ("#### 12,345.50", "12345.50", "12345.50"), ("#### \uff15", None, None),
    (f"#### {NINES}", NINES, NINES), ("16 - 3 = <<16-3=13>>13\n#### 13\n", "13", "13"),
    ("x=-7, y = 2-7", None, "7"), ("#### 0", "0", "0")])
def test_extracted_answers(text, strict, flexible):
    assert (extract_answer(text), extract_answer(text, strict=False)) == (strict, flexible)


@pytest.mark.parametrize("found, gold, right", [
    ("70000", "70000", True), ("29.00", "29", True), ("-5", "5", False), (None, None, False),
    (None, "0", False), ("0", None, False), ("70", "70000", False), ("007", "7", True)])
def test_right_answers(found, gold, right):
    assert is_right(found, gold) is right


@pytest.mark.skipif("GSM8K_DATA" not in os.environ, reason="GSM8K_DATA is no folder of its files")
@pytest.mark.parametrize("name, count, commas, negative", [
    ("train", 7473, 79, 3), ("test", 1319, 14, 2)])
def test_all_real_answers_are_right_by_themselves(name, count, commas, negative):
    path = os.path.join(os.environ["GSM8K_DATA"], f"{name}.jsonl")
    rows = [answer for _, answer in read_jsonl(path)]
    gold, found = [row.rpartition("#### ")[2] for row in rows], list(map(extract_answer, rows))
    assert len(rows) == count and list(map(int, found)) == [int(g.replace(",", "")) for g in gold]
    assert found == [extract_answer(row, strict=False) for row in rows]
    assert all(map(is_right, found, found)) and sum("," in text for text in gold) == commas
    assert sum(text.startswith("-") for text in found) == negative
    with open(path, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == train_gsm8k.DOWNLOADS[f"{name}.jsonl"]


# -------------------------------------------------------------------------------- format and files


def merging_tokenizer():
    """Byte-pair encoding that merges across what would be the boundary: ": 5" and "A: " with what
    follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Q: a b\nA: 5 + 5 = 10", "Q: c\nA: 5 + 5 = 12\n#### 5"] * 9
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def ending(tokenizer, template):
    tokens = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


@pytest.mark.parametrize("answer", ["5 + 5 = 10\n#### 10", " 5", "\n5"])
def test_the_prompt_is_a_prefix_of_prompt_and_answer(answer):
    tokenizer = ending(merging_tokenizer(), "<bos> $A")
    (prompt, ids, gold), = encode(tokenizer, [("a b", answer)], [1, 7])
    assert gold == extract_answer(answer)
    assert prompt == tokenizer.encode("Q: a b\nA: ").ids and prompt[0] == 0
    assert ids[-1] == 1 and 0 not in ids
    assert tokenizer.decode(prompt + ids[:-1]) == "Q: a b\nA: " + answer
    if answer[0] == "5":  # this tokenizer would have merged across the boundary
        assert tokenizer.encode("Q: a b\nA: " + answer).ids[:len(prompt)] != prompt
    assert encode(tokenizer, [("a b", answer)], None) == [(prompt, ids[:-1], gold)]
    ending(tokenizer, "<bos> $A <eos>")  # a prompt does not end the text
    assert encode(tokenizer, [("a b", answer)], [1, 7]) == [(prompt, ids, gold)]


def test_the_loss_is_the_answers_alone_and_the_end_has_one():
    model = Transformer.from_pretrained(os.path.join(HERE, "golden", "llama3"), dtype=torch.float64)
    rows = [([7, 8, 9], [10, 5], None), ([11], [12, 13, 14, 5], None)]  # 5: the end
    expected, found = 0.0, []
    for prompt, answer, _ in rows:
        log_p = torch.log_softmax(model(torch.tensor([prompt + answer]))[0], -1)
        terms = [log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
        expected = expected - sum(terms) / 6
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    for micro_batch in (None, 1):
        model.zero_grad()
        args = SimpleNamespace(device="cpu", bf16=False, fsdp=False, micro_batch=micro_batch)
        found.append(forward_backward(args, model, SimpleNamespace(pad_id=0), rows).item())
        for a, b in zip(expected_gradients, model.parameters()):
            torch.testing.assert_close(b.grad, a, rtol=1e-3, atol=1e-6)
    assert found == pytest.approx([expected.item()] * 2, rel=1e-5)


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[1]", "line 2: expected an object"),
    ('{"question": "a"}', "line 2: expected an object"),
    ('{"question": "a", "answer": 3}', "line 2: expected an object"),
    ('{"question": "a", "answer": "5"}', "line 2: the answer has no ####"),
    ('{"question": "a", "answer": "#### ,"}', "line 2: the answer has no ####"),
    ("\udce9", "line 2: not UTF-8"), (None, "no rows")])
def test_bad_rows_are_named(tmp_path, line, message):
    path, text = tmp_path / "train.jsonl", ""
    if line is not None:
        text = '{"question": "a", "answer": "#### 5"}\n' + line + "\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"train.jsonl[:,] {message}"):
        read_jsonl(path)


def metamath(count):
    rng, rows = random.Random(0), []
    for i in range(count):
        query = f"what is {i}, \u201cé\u201d?" + "x" * rng.randrange(60)
        rows.append({"type": rng.choice(["GSM_AnsAug", "MATH_FOBAR", "GSM_SV"]), "query": query,
                     "response": f"It, [is] {{{i}}}.\n#### {i}\nThe answer is: {i}"})
    return rows


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1000, 2**20])
def test_arrays_are_read_in_pieces(tmp_path, indent, chunk):
    rows, path = metamath(40), tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(json_array(path, chunk)) == rows
    path.write_text("[]")
    assert list(json_array(path, chunk)) == []


@pytest.mark.parametrize("text, message", [
    ("", "not a JSON array"), ("{}", "not a JSON array"), ('[{"a": 1}, {"a"', "row 2: "),
    ('[{"a": 1} }', "row 2: "), ("[1, 2", "row 3: "), ("[{" + " " * 5000, "row 1: ")])
def test_broken_arrays(tmp_path, monkeypatch, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        list(json_array(tmp_path / "a.json", chunk=100, largest=1000))


def words_tokenizer(words=("<unk>",)):
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_metamath_rows(tmp_path):
    """The rows that are too long are passed over before the first `count` are counted; the end
    token is one of a row's tokens."""
    rows, path = metamath(90), tmp_path / "MetaMathQA-395K.json"
    tokenizer = words_tokenizer()
    rows[3]["type"] = rows[7]["type"] = "GSM_SV"
    rows[3]["query"] = "one two three four five six"
    rows[7]["query"] = rows[3]["query"] + " seven"
    path.write_text(json.dumps(rows))
    kept = [(row["query"], row["response"].split("\nThe answer is")[0])
            for row in rows if "GSM" in row["type"]]
    assert list(metamath_rows(path)) == kept
    length = lambda question, answer: len(f"Q: {question}\nA: ".split() + answer.split()) + 1
    longest = length(rows[3]["query"], kept[0][1])
    short = [row for row in kept if length(*row) <= longest]
    assert {"one two three four five six"} == {q for q, _ in short if q.startswith("one")}
    assert read_metamath(path, tokenizer, 5, 20, longest) == encode(tokenizer, short[:20], 5)
    assert read_metamath(path, tokenizer, 5, 99, longest) == encode(tokenizer, short, 5)
    with pytest.raises(ValueError, match="no row of at most 3 tokens whose type has GSM in it"):
        read_metamath(path, tokenizer, 5, 99, 3)
    path.write_text(json.dumps([{"type": "GSM_SV", "query": "a"}]))
    with pytest.raises(ValueError, match="row 1: expected an object with the texts query and resp"):
        read_metamath(path, tokenizer, 5)
    path.write_text(json.dumps([{**rows[0], "type": "MATH"}]))
    with pytest.raises(ValueError, match="no row of at most 512 tokens whose type has GSM in it"):
        read_metamath(path, tokenizer, 5)


def test_downloads(tmp_path, monkeypatch):
    """From addresses of this machine: once, when the checksum is right, and to the cache."""
    (tmp_path / "test.jsonl").write_text("a row")
    monkeypatch.setenv("BILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train_gsm8k, "GSM8K", f"file://{tmp_path}/")
    no_data, cached = SimpleNamespace(data=None), tmp_path / "cache/gsm8k/test.jsonl"
    with pytest.raises(ValueError, match="test.jsonl: not available .invalid hash value.*--data"):
        train_gsm8k.data_file(no_data, "test.jsonl")
    assert not list(cached.parent.iterdir())
    sha256 = hashlib.sha256(b"a row").hexdigest()
    monkeypatch.setitem(train_gsm8k.DOWNLOADS, "test.jsonl", sha256)
    assert train_gsm8k.data_file(no_data, "test.jsonl") == str(cached)
    (tmp_path / "test.jsonl").unlink()
    assert train_gsm8k.data_file(no_data, "test.jsonl") == str(cached)
    assert cached.read_text() == "a row"
    with pytest.raises(ValueError, match="train.jsonl: .*connect to the network, or give a folder"):
        train_gsm8k.data_file(no_data, "train.jsonl")
    given = SimpleNamespace(data="d")
    assert train_gsm8k.data_file(given, "test.jsonl") == os.path.join("d", "test.jsonl")


def test_metamath_without_a_network(monkeypatch):
    def unreachable(*args, **more):
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(train_gsm8k, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"395K.json: not available .*\(no route\).*--data"):
        train_gsm8k.data_file(SimpleNamespace(data=None), train_gsm8k.METAMATH)


# ------------------------------------------------------------------------------------------ scores


def test_scores_of_four_answers(monkeypatch):
    """Right after the mark, right without one, wrong after it but right in the end, and nothing at
    all."""
    texts = ["x\n#### 5", "so it is 5", "#### 6 or 5", "none"]
    monkeypatch.setattr(train_gsm8k, "generate", lambda args, model, data, prompts: texts)
    data = SimpleNamespace(sets={"test": [([0], [0], "5")] * 4}, tokenizer=words_tokenizer())
    rows = train_gsm8k.evaluate(None, None, data)
    assert train_gsm8k.scores_of(rows) == {"accuracy": 0.25, "flexible": 0.75, "no_marker": 0.5}
    names = ("generated", "strict", "flexible", "right", "flexibly_right")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (texts[0], "5", "5", True, True), (texts[1], None, "5", False, True),
        (texts[2], "6", "5", False, True), (texts[3], None, None, False, False)]


# ------------------------------------------------------------------------------------------ runs

WORDS = ["<pad>", "<s>", "<unk>", "####", "7", "<e>", "</s>", "Q:", "A:", *"abcdef", "5", "6", "-"]
RUN = ["--task", "gsm8k", "--model", "llama", "--data", "data", "--rank", "2", "--aux-rank", "3",
       "--batch-size", "8", "--seeds", "0", "--max-new-tokens", "6", "--eval-batch-size", "4",
       "--device", "cpu", "--no-bf16"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A tiny Llama with a tokenizer of words, and GSM8K's and MetaMath's files in miniature."""
    monkeypatch.chdir(tmp_path)
    for name, family in (("llama", "llama3"), ("t5", "t5")):
        shutil.copytree(os.path.join(HERE, "golden", family), tmp_path / name)
    words_tokenizer(WORDS).save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    rng = random.Random(0)
    for name, count in (("train", 21), ("test", 11)):
        with open(tmp_path / "data" / f"{name}.jsonl", "w") as file:
            for i in range(count):
                question = " ".join(rng.choices("abcdef", k=rng.randint(2, 8)))
                row = {"question": question, "answer": f"{rng.choice('ab')} #### {5 + i % 2}"}
                file.write(json.dumps(row) + "\n")
    rows = [{"type": "GSM_SV", "query": "a b", "response": f"c\n#### 5\nThe answer is: {i}"}
            for i in range(9)]
    (tmp_path / "data" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    return tmp_path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_of_all_methods(folders, capsys):
    report = main([*RUN, "--out", "out"])
    printed = capsys.readouterr().out
    assert report == json.loads((folders / "out/metrics.json").read_text())
    assert (report["task"], report["model"]) == ("gsm8k", "llama")
    names = {"accuracy", "flexible", "no_marker"}
    assert list(report["summary"]) == list(PAPERS)
    assert report["summary"]["lora"].keys() >= names and "A few generations:" in printed
    assert printed.splitlines()[-1].startswith("Table: ")
    assert all(f"| {name} |" in printed for name in names)
    test = jsonl(folders / "data" / "test.jsonl")
    for run in report["results"]:
        folder = folders / "out" / f"{run['method']}-seed0"
        rows = jsonl(folder / "predictions.jsonl")
        assert [row["prompt"] for row in rows] == [f"Q: {row['question']} A:" for row in test]
        assert [row["gold"] for row in rows] == [str(5 + i % 2) for i in range(11)]
        for row in rows:
            assert row["strict"] == extract_answer(row["generated"])
            assert row["right"] == (row["strict"] == row["gold"])
        assert run["metrics"]["accuracy"] == sum(row["right"] for row in rows) / 11
        assert run["metrics"]["no_marker"] == sum(row["strict"] is None for row in rows) / 11
        found = [extract_answer(row["generated"], strict=False) for row in rows]
        right = sum(a == row["gold"] for a, row in zip(found, rows))
        assert run["metrics"]["flexible"] == right / 11
        log = log_of(folder)
        assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
        assert all(math.isfinite(row["loss"]) for row in log)
        auxiliary = 984 if run["method"] == "bi-lora" else 0
        assert run["parameters"] == {"primary": 656, "auxiliary": auxiliary, "head": 0, "base": 0}
        model = Transformer.from_pretrained("llama")
        add_lora(model, 2, 16)
        load_adapter(model, str(folder), model.module_names, read_safetensors)
    first = {losses(folders / "out" / f"{method}-seed0")[0] for method in PAPERS}
    assert len(first) == 1  # the same rows, the same start


def test_it_learns_and_is_scored_by_what_it_generates(folders):
    """With one answer for all, it is soon generated, and every way of batching finds it."""
    for name in ("train", "test"):
        path = folders / "data" / f"{name}.jsonl"
        path.write_text(path.read_text().replace("#### 6", "#### 5"))
    run = [*RUN, "--method", "lora", "--epochs", "40", "--lr", "0.015", "--rank", "4"]
    (result,) = main([*run, "--out", "out"])["results"]
    found = [result["metrics"][name] for name in ("accuracy", "flexible", "no_marker")]
    assert found == [1.0, 1.0, 0.0]


def test_batches_of_any_size_generate_the_same(folders):
    texts = []
    for size in ("1", "3", "16"):
        main([*RUN, "--method", "lora", "--out", size, "--eval-batch-size", size, "--lr", "0.01"])
        texts.append((folders / size / "lora-seed0/predictions.jsonl").read_text())
    assert texts[0] == texts[1] == texts[2]
    assert len({json.loads(line)["generated"] for line in texts[0].splitlines()}) > 1


def test_metamath_bf16_and_limits(folders):
    limits = ["--limit", "6", "--eval-limit", "3", "--micro-batch", "4"]
    run = ["--task", "metamath", *RUN[2:-1], "--bf16", *limits, "--method", "bi-lora"]
    report, out = main([*run, "--out", "out"]), folders / "out/bi-lora-seed0"
    assert len(log_of(out)) == 2 and len(jsonl(out / "predictions.jsonl")) == 3
    assert all(tensor.dtype == torch.float32 for tensor in read_safetensors(out / ADAPTER).values())
    assert report["config"]["bf16"]


def test_the_limit_is_drawn_by_the_seed(folders, monkeypatch):
    """And rows share a batch by the tokens of prompt and answer together."""
    drawn, loaded, load = {}, [], train_gsm8k.load
    monkeypatch.setattr(train_gsm8k, "load", lambda args: loaded.append(load(args)) or loaded[-1])
    monkeypatch.setattr(train_gsm8k, "plan_batches", lambda args, seed, lengths: (
        drawn.setdefault(seed, []).append(lengths) or train_glue.plan_batches(args, seed, lengths)))
    run = [*RUN, "--limit", "12", "--epochs", "1", "--eval-limit", "1", "--method", "lora"]
    main([*run, "--seeds", "0", "1", "--out", "out"])
    main([*run, "--out", "again"])
    assert drawn[0][0] == drawn[0][1] != drawn[1][0] and len(drawn[0][0]) == 12
    rows = random.Random("limit-0").sample(loaded[0].rows, 12)
    assert drawn[0][0] == [len(prompt + answer) for prompt, answer, _ in rows]


@pytest.mark.parametrize("method", PAPERS)
def test_interrupted_and_resumed_equals_straight(folders, monkeypatch, method):
    run, calls = [*RUN, "--method", method, "--save-every", "2", "--dropout", "0.1"], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == (7 if method == "lora-sam" else 4):
            raise KeyboardInterrupt
        return forward_backward(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(train_gsm8k, "forward_backward", interrupted)
        main([*run, "--out", "out"])
    main([*run, "--out", "out", "--resume"])
    main([*run, "--out", "straight"])
    resumed, straight = (folders / out / f"{method}-seed0" for out in ("out", "straight"))
    assert outcome(resumed) == outcome(straight)
    assert jsonl(resumed / "predictions.jsonl") == jsonl(straight / "predictions.jsonl")


def without_an_end(folders):
    config = json.loads((folders / "llama/config.json").read_text())
    (folders / "llama/config.json").write_text(json.dumps({**config, "eos_token_id": None}))


def unknown_token(folders):
    words = [*WORDS, *map(str, range(60, 90)), "ab"]
    words_tokenizer(words).save(str(folders / "llama/tokenizer.json"))
    with open(folders / "data/test.jsonl", "a") as file:
        file.write('{"question": "ab", "answer": "#### 5"}\n')


@pytest.mark.parametrize("change, message", [
    (without_an_end, "config.json: no eos_token_id"),
    (unknown_token, "tokenizer.json: gives token 48; the model has 40"),
    (["--max-new-tokens", "57"], "the longest prompt and --max-new-tokens: 65 tokens"),
    (["--model", "t5"], "t5: a model of the family t5 has an encoder"),
    (["--data", "nowhere"], "nowhere/train.jsonl"), (["--rank", "13"], "rank is 13"),
    (["--max-length", "3"], "--max-length is 3; every row is longer"),
    (["--eval-limit", "0"], "--eval-limit: '0'"), (["--model", "./nowhere"], "no such folder"),
    (["--method", "sam"], "invalid choice"), (["--task", "mrpc"], "invalid choice: 'mrpc'")])
def test_wrong_input_is_one_line_and_exit_code_2(folders, capsys, change, message):
    if callable(change):
        change(folders)
    before = sorted(folders.rglob("*"))
    assert message in error_of(capsys, [*RUN, *([] if callable(change) else change)], main)
    assert sorted(folders.rglob("*")) == before


def test_the_defaults_are_the_papers():
    argv = ["--task", "metamath", "--model", "m"]
    args, _ = train_glue.parse_arguments(argv, "", train_gsm8k.TASKS, train_gsm8k.OPTIONS)
    expected = {"lr": 5e-4, "batch_size": 32, "micro_batch": 4, "epochs": 2, "max_length": 1024,
                "max_new_tokens": 512, "rank": 8, "alpha": 16, "aux_rank": 8, "rho": [0.01, 0.05],
                "dropout": 0.0, "bf16": True, "ascent": "sgd", "aux_lr": None, "seeds": [0, 1, 2]}
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.limit is None and args.eval_limit is None  # all
    assert (train_gsm8k.METAMATH_ROWS, train_gsm8k.METAMATH_TOKENS) == (100_000, 512)


def test_a_model_has_to_be_named(capsys):
    assert "--task gsm8k needs --model" in error_of(capsys, ["--task", "gsm8k"], main)


def test_rows_that_are_too_long_are_left_out(folders, capsys):
    main([*RUN, "--method", "lora", "--max-length", "10", "--out", "out", "--eval-limit", "2"])
    train = jsonl(folders / "data/train.jsonl")
    long = sum(len(row["question"].split()) + 2 + 3 + 1 > 10 for row in train)
    message = f"data/train.jsonl: {long} rows of more than 10 tokens are left out"
    assert message in capsys.readouterr().out and 0 < long < 21


def test_the_padding_token_needs_no_embedding(folders):
    """The tokenizer's padding id is the size of the vocabulary: the run is that of any other."""
    short = [*RUN, "--method", "lora", "--epochs", "1", "--eval-limit", "5"]
    main([*short, "--out", "first"])
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = words_tokenizer(WORDS)
    tokenizer.model = models.WordLevel({**ids, "<pad>": 40}, unk_token="<unk>")
    tokenizer.save(str(folders / "llama" / "tokenizer.json"))
    main([*short, "--out", "second"])
    first, second = (folders / out / "lora-seed0" for out in ("first", "second"))
    assert losses(first) == losses(second)
    assert jsonl(first / "predictions.jsonl") == jsonl(second / "predictions.jsonl")


def test_the_rows_that_are_left_out_are_told_once(folders, capfd):
    """By the command, and not by `load`, which every process calls."""
    main([*RUN, "--method", "lora", "--max-length", "10", "--epochs", "1", "--eval-limit", "1"])
    assert capfd.readouterr().out.count("rows of more than 10 tokens are left out") == 1


@pytest.mark.parametrize("end", ["\n", "\n\n", " \r\n"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path, end):
    row, path = '{"question": "a", "answer": "#### 5"}\n', tmp_path / "train.jsonl"
    path.write_text(row + end)
    assert read_jsonl(path) == [("a", "#### 5")]
    path.write_text(row + end + row)
    with pytest.raises(ValueError, match="train.jsonl, line 2: a blank line before the last row"):
        read_jsonl(path)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for read in (read_jsonl, lambda path: list(json_array(path))):
        with pytest.raises(ValueError, match="train.jsonl: a Git LFS pointer; run git lfs pull"):
            read(path)


@pytest.mark.parametrize("text, strict, flexible", [
    ("1/2", None, None), ("#### 12.5/5", None, None), ("#### $5/$2", None, None),
    ("1/2 of 10 is 5", None, "5"), ("#### 10 / 2", None, None), ("(3 + 4)/2", None, None),
    ("x/2", None, None), ("#### 3 1/2", None, None), ("#### 3\u00bd", None, None),
    ("it is \u00be", None, None), (r"so \frac{1}{2}", None, None),
    (r"\dfrac{1}{2} or 5", None, "5"), ("#### 1/-2", None, None), ("$5/hour", None, "5"),
    ("#### 5/day", "5", "5"), ("20%/5%", None, None), ("3 then 1/2", None, None),
    ("10//3", None, None), ("20%-5%", None, "5"), ("20% -5%", None, "5"), ("3-2", None, "2"),
    ("(3 + 4)-2", None, "2"), ("[4] -2", None, "2"), ("$20-$5", None, "5"), ("20$-5$", None, "5"),
    ("\u20ac20-\u20ac5", None, "5"), ("x-5", None, "5"), ("5 - -3", None, "-3"),
    ("3--2", None, "-2"), ("(-5)", None, "-5"), ("= -$1,250.75", None, "-1250.75"),
    ("#### -.5", "-.5", "-.5"), ("\u20ac-5", None, "-5"), ("-\u20ac5", None, "-5"),
    ("#### \u20ac5", "5", "5"), ("is -5%", None, "-5"), ("#### 20%", "20", "20"),
    ("#### \u22121/2", None, None), ("**-5**", None, "-5"), ("12/05/2021", None, None),
    ("on 2021-05-12", None, None), ("12.05.2021", None, None), ("#### 3:30", None, None),
    ("a ratio of 3:2", None, None), ("1.2.3", None, None), ("#### 1e5", None, None),
    ("#### 2^10", None, None), ("x^2", None, None), ("#### 10^-3", None, None),
    ("It is 5.", None, "5"), ("wait...6", None, "6"), ("One.2 more", None, "2"),
    ("$.50", None, ".50"), ("5.5 or 6.25.", None, "6.25"), ("#### 5kg", "5", "5"),
    ("2021", None, "2021"), ("10-20", None, "20"), ("Total:5", None, "5"), ("1,234,56", None, "56"),
    ("12345,678", None, "678"), ("1,00,000", None, None), ("#### 1,00,000", None, None),
    ("2^{10}", None, None), ("#### 10^{-2}", None, None), ("2**10", None, None),
    ("**5**", None, "5"), (r"\dfrac12", None, None), ("1\u20442", None, None),
    (r"-\$5", None, "-5"), ("#### 5 \u00bd", None, None)])
def test_where_a_number_ends_and_begins(text, strict, flexible):
    """A fraction, a date, a time, a ratio or a power is no number, nor is a part of one."""
    assert (extract_answer(text), extract_answer(text, strict=False)) == (strict, flexible)


def test_long_texts_are_searched_in_no_time():
    for part in ("1/", "1.1", "1,111", "-", "1 1 ", "1 ", r"\frac{"):
        assert extract_answer("#### " + part * 9999 + "x") in (None, "1")
        assert extract_answer(part * 9999 + "/ 7", strict=False) in (None, "7")


def test_no_task_of_one_script_writes_where_one_of_the_other_does():
    places = [out_of(train_glue, task) for task in train_glue.TASKS]
    places += [out_of(train_gsm8k, task) for task in train_gsm8k.TASKS]
    assert len(set(places)) == len(places)


def out_of(script, task):
    """The default of --out."""
    settings = script.SETTINGS if script is train_glue else script.TASKS
    words = ["--task", task, "--model", "m"]
    return train_glue.parse_arguments(words, "", settings, [])[0].out

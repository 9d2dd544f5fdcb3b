"""The GSM8K script: answers, files, generated problems, runs.

Oracles: a table of answers written by hand; arithmetic by Python; the model's own log-probabilities token by token; the
real test file's 1,319 answers and the real training file (with GSM8K_DATA set).
"""

import json
import math
import os
import random
import re
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import train_gsm8k
import train_glue
from bilora import add_lora, load_adapter
from model import Transformer
from test_train_glue import outcome
from train_glue import METHODS, forward_backward
from train_gsm8k import (PRETRAINING, TRANSFER, embedded_tokenizer, encode, extract_answer, is_right, json_array, main, metamath_rows,
                         problem, read_jsonl, read_metamath)

HERE = os.path.dirname(os.path.abspath(__file__))

# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("text, strict, flexible", [
    ("... so 70,000.\n#### 70,000", "70000", "70000"), ("#### $29.00", "29.00", "29.00"), ("It is 72.\n#### 72.", "72", "72"),
    ("#### -5", "-5", "-5"), ("10-5", None, "5"), ("#### ,", None, None), ("#### none, 3 left", None, "3"), ("", None, None),
    ("no marker 12 but 13", None, "13"), ("####1,234,567", "1234567", "1234567"), ("#### 5 apples\n#### 6", "5", "6"),
    ("#### 3.5", "3.5", "3.5"), ("a lone $ and #### $", None, None), ("-$5", None, "-5"), ("#### \n 4", "4", "4"),
    ("#### -$5", "-5", "-5"), ("#### $-5", "-5", "-5"), ("#### $1,000,000", "1000000", "1000000"), ("####72####", "72", "72"),
    ("#### 1/2", None, "2"), ("#### .5", ".5", ".5"), ("(3,4)", None, "4"), ("x = \u22125", None, "-5"), ("20 -3", None, "3"),
    ("#### **5**", "5", "5"), ("#### 12,345.50", "12345.50", "12345.50"), ("#### \uff15", None, None), ("#### " + "9" * 60, "9" * 60, "9" * 60), ("16 - 3 = <<16-3=13>>13\n#### 13\n", "13", "13"), ("x=-7, y = 2-7", None, "7"), ("#### 0", "0", "0"),
])
def test_extracted_answers(text, strict, flexible):
    assert extract_answer(text) == strict and extract_answer(text, strict=False) == flexible


@pytest.mark.parametrize("found, gold, right", [
    ("70000", "70000", True), ("29.00", "29", True), ("-5", "5", False), (None, None, False), (None, "0", False), ("0", None, False),
    ("70", "70000", False), ("007", "7", True)])
def test_right_answers(found, gold, right):
    assert is_right(found, gold) is right


@pytest.mark.skipif("GSM8K_DATA" not in os.environ, reason="GSM8K_DATA is not set to a folder with GSM8K's files")
def test_all_real_answers_are_right_by_themselves():
    rows = {name: read_jsonl(os.path.join(os.environ["GSM8K_DATA"], f"{name}.jsonl")) for name in ("train", "test")}
    assert {name: len(part) for name, part in rows.items()} == {"train": 7473, "test": 1319}
    for name, commas, negative in (("train", 79, 3), ("test", 14, 2)):
        gold = [answer.rpartition("#### ")[2] for _, answer in rows[name]]
        found = [extract_answer(answer) for _, answer in rows[name]]
        assert [int(text) for text in found] == [int(text.replace(",", "")) for text in gold]
        assert found == [extract_answer(answer, strict=False) for _, answer in rows[name]]
        assert all(map(is_right, found, found)) and sum("," in text for text in gold) == commas
        assert sum(text.startswith("-") for text in found) == negative


# ------------------------------------------------------------------------------------------ format and files


def merging_tokenizer():
    """Byte-pair encoding that merges across what would be the boundary: ": 5" and "A: " with what follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Q: a b\nA: 5 + 5 = 10", "Q: c\nA: 5 + 5 = 12\n#### 5"] * 9
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, special_tokens=["<bos>", "<eos>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


@pytest.mark.parametrize("answer", ["5 + 5 = 10\n#### 10", " 5", "\n5"])
def test_the_prompt_is_a_prefix_of_prompt_and_answer(answer):
    tokenizer = merging_tokenizer()
    prompt, ids, gold = encode(tokenizer, [("a b", answer)], [1, 7])[0]
    assert gold == extract_answer(answer)
    assert prompt == tokenizer.encode("Q: a b\nA: ").ids and prompt[0] == 0
    assert ids[-1] == 1 and 0 not in ids and tokenizer.decode(prompt + ids[:-1]) == "Q: a b\nA: " + answer
    if answer[0] == "5":  # this tokenizer would have merged across the boundary
        assert tokenizer.encode("Q: a b\nA: " + answer).ids[:len(prompt)] != prompt
    assert encode(tokenizer, [("a b", answer)], None)[0] == (prompt, ids[:-1], gold)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    assert encode(tokenizer, [("a b", answer)], [1, 7])[0] == (prompt, ids, gold)  # a prompt does not end the text


def test_the_loss_is_the_answers_alone_and_the_end_has_one():
    model = Transformer.from_pretrained(os.path.join(HERE, "golden", "llama3"), dtype=torch.float64)
    rows = [([7, 8, 9], [10, 5], None), ([11], [12, 13, 14, 5], None)]  # 5: the end
    experiment = train_gsm8k.Experiment(None, None, None, 0, [])
    args = train_glue.argparse.Namespace(device="cpu", bf16=False, micro_batch=None)
    expected = 0.0
    for prompt, answer, _ in rows:
        log_p = torch.log_softmax(model(torch.tensor([prompt + answer]))[0], -1)
        expected = expected - sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)) / 6
    assert forward_backward(model, experiment, rows, args).item() == pytest.approx(expected.item(), rel=1e-5)
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    forward_backward(model, experiment, rows, train_glue.argparse.Namespace(device="cpu", bf16=False, micro_batch=1))
    for a, b in zip(whole, model.parameters()):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[1]", "line 2: expected an object"), ('{"question": "a"}', "line 2: expected an object"),
    ('{"question": "a", "answer": 3}', "line 2: expected an object"), ('{"question": "a", "answer": "5"}', "line 2: the answer has no ####"),
    ('{"question": "a", "answer": "#### ,"}', "line 2: the answer has no ####")])
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "a", "answer": "#### 5"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl, {message}"):
        read_jsonl(path)
    path.write_text("")
    with pytest.raises(ValueError, match="train.jsonl: no rows"):
        read_jsonl(path)


def metamath(count):
    rng, rows = random.Random(0), []
    for i in range(count):
        kind = rng.choice(["GSM_AnsAug", "MATH_FOBAR", "GSM_SV"])
        rows.append({"type": kind, "query": f"what is {i}, \u201cé\u201d?" + "x" * rng.randrange(60),
                     "original_question": "o", "response": f"It, [is] {{{i}}}.\n#### {i}\nThe answer is: {i}"})
    return rows


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1000, 2**20])
def test_arrays_are_read_in_pieces(tmp_path, indent, chunk):
    rows = metamath(40)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(json_array(tmp_path / "a.json", chunk)) == rows
    (tmp_path / "a.json").write_text("[]")
    assert list(json_array(tmp_path / "a.json", chunk)) == []


@pytest.mark.parametrize("text, message", [
    ("", "not a JSON array"), ("{}", "not a JSON array"), ('[{"a": 1}, {"a"', "row 2: "), ('[{"a": 1} }', "row 2: "), ("[1, 2", "row 3: ")])
def test_broken_arrays(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        list(json_array(tmp_path / "a.json"))


def test_a_broken_row_does_not_pull_the_file_into_memory(tmp_path):
    path, read = tmp_path / "a.json", []
    path.write_text("[" + "{" + " " * 5000)
    with pytest.raises(ValueError, match="row 1"):
        for _ in json_array(path, chunk=100, largest=1000):
            pass


def words_tokenizer():
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def test_metamath_rows(tmp_path):
    """The rows that are too long are passed over before the first `count` are counted; the end token is one of a row's tokens."""
    rows, path, tokenizer = metamath(90), tmp_path / "MetaMathQA-395K.json", words_tokenizer()
    rows[3]["type"] = rows[7]["type"] = "GSM_SV"
    rows[3]["query"], rows[7]["query"] = "one two three four five six", "one two three four five six seven"
    path.write_text(json.dumps(rows))
    kept = [(row["query"], row["response"].split("\nThe answer is")[0]) for row in rows if "GSM" in row["type"]]
    assert list(metamath_rows(path)) == kept
    length = lambda question, answer: len(f"Q: {question}\nA: ".split()) + len(answer.split()) + 1
    longest = length(*kept[[question for question, _ in kept].index(rows[3]["query"])])
    short = [row for row in kept if length(*row) <= longest]
    assert [rows[i]["query"] in [question for question, _ in short] for i in (3, 7)] == [True, False]
    assert read_metamath(path, tokenizer, 5, 20, longest) == encode(tokenizer, short[:20], 5)
    assert read_metamath(path, tokenizer, 5, 99, longest) == encode(tokenizer, short, 5)
    with pytest.raises(ValueError, match="no row of at most 3 tokens whose type has GSM in it"):
        read_metamath(path, tokenizer, 5, 99, 3)
    path.write_text(json.dumps([{"type": "GSM_SV", "query": "a"}]))
    with pytest.raises(ValueError, match="row 1: expected an object with the texts query and response"):
        read_metamath(path, tokenizer, 5)
    path.write_text(json.dumps([{**rows[0], "type": "MATH"}]))
    with pytest.raises(ValueError, match="no row of at most 512 tokens whose type has GSM in it"):
        read_metamath(path, tokenizer, 5)


def test_downloads_of_gsm8k(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("BILORA_CACHE", str(tmp_path))
    monkeypatch.setattr(train_gsm8k, "download", lambda *args: asked.append(args) or open(args[-1], "w").close())
    args = train_glue.argparse.Namespace(data=None)
    paths = [train_gsm8k.data_file(args, "test.jsonl") for _ in range(2)]
    assert paths == [str(tmp_path / "gsm8k" / "test.jsonl")] * 2 and len(asked) == 1
    assert asked[0][:3] == (train_gsm8k.GSM8K + "test.jsonl", *train_gsm8k.DOWNLOADS["test.jsonl"])
    assert train_gsm8k.data_file(train_glue.argparse.Namespace(data="d"), "test.jsonl") == os.path.join("d", "test.jsonl")
    if "GSM8K_DATA" in os.environ:
        import hashlib
        for name, (size, sha256) in train_gsm8k.DOWNLOADS.items():
            data = open(os.path.join(os.environ["GSM8K_DATA"], name), "rb").read()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


# ------------------------------------------------------------------------------------------ the embedded problems


@pytest.mark.parametrize("kinds", [PRETRAINING, TRANSFER])
def test_generated_problems_are_right(kinds):
    """Every step is true and uses numbers of the question or of earlier steps; the last one is the answer."""
    rng, seen = random.Random(0), set()
    for _ in range(1500):
        question, answer = problem(rng, kinds)
        known = {int(n) for n in re.findall(r"\d+", question)} | {2}  # half of it
        steps = re.findall(r"(\S+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", answer)
        assert 2 <= len(steps) <= 4 and answer.count("<<") == len(steps)
        for shown, a, operator, b, result, again in steps:
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operator]
            assert shown.lstrip("$") == f"{a}{operator}{b}" and result == again and exact == int(result)
            assert {int(a), int(b)} <= known
            known.add(int(result))
        assert answer.endswith(f"\n#### {steps[-1][4]}") and extract_answer(answer) == steps[-1][4]
        assert not re.search(r"[{}()|\[\]]", question + answer)
        seen.add(question)
    assert len(seen) > 1400


def test_kinds_of_problems_differ():
    def formula(kind):
        """The answer as an expression of the question's numbers, whichever they are: ((#*#)-#)."""
        values = {}
        for result, a, operator, b in re.findall(r"\[(\w)=(\w)(.)(\w)\]", kind[2]):
            values[result] = f"({values.get(a, '#')}{operator}{values.get(b, '#')})"
        return values[result]

    assert len(PRETRAINING) >= 8 and len(TRANSFER) >= 3
    assert not set(map(formula, TRANSFER)) & set(map(formula, PRETRAINING))


def test_the_tokenizer_gives_the_text_back():
    tokenizer, rng = embedded_tokenizer(), random.Random(1)
    for kinds in (PRETRAINING, TRANSFER):
        for _ in range(300):
            question, answer = problem(rng, kinds)
            (prompt, ids, _), = encode(tokenizer, [(question, answer)], train_gsm8k.EOS)
            assert tokenizer.decode(prompt) == f"Q: {question}\nA: " and tokenizer.decode(ids) == answer
            tokens = tokenizer.encode(answer, add_special_tokens=False).tokens
            assert all(len(token.strip()) == 1 for token in tokens if any(c.isdigit() for c in token))  # a digit a token


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A tiny Llama with a byte-level tokenizer, and GSM8K's and MetaMath's files in miniature."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(os.path.join(HERE, "golden", "llama3"), tmp_path / "llama")
    shutil.copytree(os.path.join(HERE, "golden", "t5"), tmp_path / "t5")
    words = ["<pad>", "<s>", "<unk>", "####", "7", "<e>", "</s>", "Q:", "A:", *"abcdef", "5", "6", "-"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    rng = random.Random(0)
    for name, count in (("train", 21), ("test", 11)):
        rows = [{"question": " ".join(rng.choices("abcdef", k=rng.randint(2, 8))), "answer": f"{rng.choice('ab')} #### {5 + i % 2}"}
                for i in range(count)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"type": "GSM_SV", "query": "a b", "response": f"c\n#### {i % 2 + 5}\nThe answer is: {i % 2 + 5}"} for i in range(9)]
    (tmp_path / "data" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    return tmp_path


RUN = ["--task", "gsm8k", "--model", "llama", "--data", "data", "--rank", "2", "--aux-rank", "3", "--batch-size", "8", "--seeds", "0",
       "--max-new-tokens", "6", "--eval-batch-size", "4", "--device", "cpu", "--no-bf16"]


def test_runs_of_all_methods(folders, capsys):
    report = main([*RUN, "--out", "out", "--merge"])
    printed = capsys.readouterr().out
    assert report["summary"].keys() == set(METHODS[:3]) and report["summary"]["lora"].keys() == {"accuracy", "flexible", "no_marker"}
    assert "A few generations:" in printed and "| accuracy " in printed and "| no_marker" in printed
    for run in report["results"]:
        folder = folders / "out" / f"{run['method']}-seed0"
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        test = [json.loads(line) for line in (folders / "data" / "test.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [f"Q: {row['question']} A:" for row in test]
        assert [row["gold"] for row in rows] == [str(5 + i % 2) for i in range(11)]
        for row in rows:
            assert row["strict"] == extract_answer(row["generated"]) and row["right"] == (row["strict"] == row["gold"])
        assert run["metrics"]["accuracy"] == sum(row["right"] for row in rows) / 11
        assert run["metrics"]["flexible"] == sum(extract_answer(row["generated"], strict=False) == row["gold"] for row in rows) / 11
        assert run["metrics"]["no_marker"] == sum(row["strict"] is None for row in rows) / 11
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert len(log) == 6 and all(math.isfinite(row["loss"]) for row in log)
        assert run["parameters"] == {"primary": 656, "auxiliary": 984 if run["method"] == "bi-lora" else 0, "head": 0}
        model, merged = Transformer.from_pretrained("llama"), Transformer.from_pretrained(folder / "merged")
        add_lora(model, 2, 16)
        load_adapter(model, folder, model.module_names)
        ids = torch.tensor([[7, 8, 9, 10]])
        torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=1e-5)


def test_it_learns_and_is_scored_by_what_it_generates(folders):
    """With one answer for all, it is soon generated, and every way of batching finds it."""
    for name in ("train", "test"):
        path = folders / "data" / f"{name}.jsonl"
        path.write_text(re.sub("#### 6", "#### 5", path.read_text()))
    report = main([*RUN, "--method", "lora", "--epochs", "60", "--lr", "0.01", "--rank", "4", "--out", "out"])
    assert report["results"][0]["metrics"] == {"accuracy": 1.0, "flexible": 1.0, "no_marker": 0.0}


def test_batches_of_any_size_generate_the_same(folders):
    texts = []
    for size in ("1", "3", "16"):
        main([*RUN, "--method", "lora", "--out", size, "--eval-batch-size", size, "--lr", "0.01"])
        texts.append((folders / size / "lora-seed0" / "predictions.jsonl").read_text())
    assert texts[0] == texts[1] == texts[2] and len(set(json.loads(line)["generated"] for line in texts[0].splitlines())) > 1


def test_metamath_bf16_and_limits(folders):
    report = main(["--task", "metamath", *RUN[2:-1], "--bf16", "--limit", "6", "--eval-limit", "3", "--method", "bi-lora", "--out", "out"])
    log = (folders / "out/bi-lora-seed0/log.jsonl").read_text().splitlines()
    assert len(log) == 2 and len((folders / "out/bi-lora-seed0/predictions.jsonl").read_text().splitlines()) == 3
    adapter = torch.load(folders / "out/bi-lora-seed0/adapter_model.bin", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values()) and report["config"]["bf16"]


@pytest.mark.parametrize("method", METHODS)
def test_resume(folders, monkeypatch, method):
    run = [*RUN, "--method", method, "--save-every", "2", "--dropout", "0.1"]
    steps, whole = [], train_glue.train_step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*run, "--out", "out"])
    main([*run, "--resume", "out"])
    main([*run, "--out", "straight"])
    assert outcome(folders / f"out/{method}-seed0") == outcome(folders / f"straight/{method}-seed0")
    names = [(folders / out / f"{method}-seed0" / "predictions.jsonl").read_text() for out in ("out", "straight")]
    assert names[0] == names[1]


@pytest.mark.parametrize("change, message", [
    ("no eos", "config.json: no eos_token_id"), (["--max-new-tokens", "57"], "the longest prompt and --max-new-tokens: 65 tokens"),
    (["--model", "t5"], "t5: a model of the family t5 has an encoder"), (["--data", "nowhere"], "nowhere/train.jsonl"),
    (["--max-length", "3"], "--max-length is 3; every row is longer"), (["--max-new-tokens", "70"], "the longest prompt and --max-new-tokens"),
    (["--task", "embedded"], "--data is for a real model"), (["--rank", "13"], "rank is 13"), (["--eval-limit", "0"], "--eval-limit: '0'"),
    (["--model", "nowhere/at/all"], "no such folder"), (["--method", "sam"], "invalid choice"),
])
def test_wrong_input_is_one_line_and_exit_code_2(folders, capsys, change, message):
    if change == "no eos":
        config = json.loads((folders / "llama" / "config.json").read_text())
        (folders / "llama" / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    before = sorted(folders.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([*RUN, *(change if isinstance(change, list) else [])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert sorted(folders.rglob("*")) == before


def test_the_defaults_are_the_papers():
    _, args = train_gsm8k.parse_arguments(["--task", "metamath", "--model", "m"])
    assert (args.lr, args.batch_size, args.micro_batch, args.epochs, args.max_length, args.max_new_tokens) == (5e-4, 32, 4, 2, 1024, 512)
    assert (args.rank, args.alpha, args.aux_rank, args.rho, args.dropout, args.bf16) == (8, 16, 8, [0.01, 0.05], 0.0, True)
    assert args.ascent == "sgd" and args.seeds == [0, 1, 2]
    assert (train_gsm8k.METAMATH_ROWS, train_gsm8k.METAMATH_TOKENS) == (100_000, 512) and args.aux_lr is None and args.eval_limit is None


def test_a_model_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        main(["--task", "gsm8k"])
    assert "--task gsm8k needs --model" in capsys.readouterr().err


def test_rows_that_are_too_long_are_left_out(folders, capsys):
    main([*RUN, "--method", "lora", "--max-length", "10", "--out", "out", "--eval-limit", "2"])
    train = [json.loads(line) for line in (folders / "data" / "train.jsonl").read_text().splitlines()]
    long = sum(len(row["question"].split()) + 2 + 3 + 1 > 10 for row in train)
    assert f"data/train.jsonl: {long} rows of more than 10 tokens are left out" in capsys.readouterr().out and 0 < long < 21


@pytest.mark.pictures
def test_the_embedded_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--seeds", "0", "--limit", "16", "--epochs", "1", "--eval-limit", "6", "--pretraining-steps", "2", "--max-new-tokens", "5",
           "--batch-size", "8", "--device", "cpu"]
    report = main(run)
    (cache,) = (tmp_path / "runs").glob("pretrained-*.pt")
    assert report["task"] == "embedded" and len(report["results"]) == 3 and (tmp_path / "runs/gsm8k-embedded/curves.png").exists()
    stamp = cache.stat().st_mtime_ns
    again = main([*run, "--method", "lora"])
    assert cache.stat().st_mtime_ns == stamp and again["results"][0]["metrics"] == report["results"][0]["metrics"]


def test_embedded_problems_are_new_and_of_other_kinds(tmp_path, monkeypatch):
    train, test = (train_gsm8k.embedded_rows(0, split, 500) for split in ("train", "test"))
    assert train == train_gsm8k.embedded_rows(0, "train", 500) != train_gsm8k.embedded_rows(1, "train", 500)
    assert len(set(test) & set(train)) == 0


def test_scores_of_four_answers(monkeypatch):
    """Right after the mark, right without one, wrong after it but right in the end, and nothing at all."""
    texts = ["x\n#### 5", "so it is 5", "#### 6 or 5", "none"]
    monkeypatch.setattr(train_gsm8k, "generate", lambda model, experiment, prompts, args: texts)
    experiment = train_gsm8k.Experiment(None, None, embedded_tokenizer(), 0, [])
    metrics, record, files = experiment.evaluate(None, {"test": [([1], [2], "5")] * 4}, None)
    assert metrics == {"accuracy": 0.25, "flexible": 0.75, "no_marker": 0.5} and len(record["samples"]) == 3
    rows = [json.loads(line) for line in files["predictions.jsonl"].splitlines()]
    assert [(row["strict"], row["flexible"], row["right"], row["flexibly_right"]) for row in rows] == [
        ("5", "5", True, True), (None, "5", False, True), ("6", "5", False, True), (None, None, False, False)]

"""T5 and decoders in the GLUE script: prompts, answers, their losses and scores, runs.

Oracles: log-softmax of one row at a time, without padding, summed token by token here; prompts written out by hand.  The
models are the tiny random ones of tests/golden/.
"""

import json
import math
import os
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import train_glue
from bilora import add_lora, load_adapter
from model import Transformer, load_tokenizer
from train_glue import GENERIC, METHODS, T5_OWN, TASKS, answer_losses, class_scores, forward_backward, main, predict

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
CPU = train_glue.argparse.Namespace(device="cpu", bf16=False, micro_batch=3)
ANSWERS = [[8, 9, 10, 12], [8, 9, 11, 12], [8]]  # the first tokens do not tell them apart


def load(family, dtype=torch.float64):
    return Transformer.from_pretrained(os.path.join(GOLDEN, family), dtype=dtype)


def experiment(pad_id=0):
    return train_glue.Experiment(TASKS["mnli"], None, None, pad_id, "accuracy", [], ANSWERS)


def prompts(count=7):
    rng = random.Random(0)
    return [([rng.randrange(7, 40) for _ in range(rng.randint(2, 9))], None, i % 3) for i in range(count)]


def log_likelihood(model, prompt, answer):
    """log p(answer | prompt), a token after the other."""
    total = 0.0
    for i, token in enumerate(answer):
        if model.encoder is None:
            logits = model(torch.tensor([prompt + answer[:i]]))
        else:
            logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[model.config.start_id] + answer[:i]]))
        total = total + torch.log_softmax(logits[0, -1], -1)[token]
    return total


@pytest.mark.parametrize("family", ["t5", "flan-t5", "llama2", "llama3", "qwen2"])
def test_scores_are_the_log_probabilities_of_whole_answers(family):
    model, rows = load(family), prompts(25)
    with torch.no_grad():
        expected = torch.tensor([[log_likelihood(model, ids, answer) for answer in ANSWERS] for ids, *_ in rows])
        found = class_scores(model, experiment(), rows, torch.device("cpu"))
        padded = class_scores(model, experiment(pad_id=3), rows, torch.device("cpu"))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)  # the loss is computed in float32
    assert torch.equal(found, padded)  # whatever the padding is
    assert predict(model, experiment(), rows, CPU) == expected.argmax(1).tolist()
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3  # the later tokens tell them apart


@pytest.mark.parametrize("family", ["t5", "llama3"])
def test_micro_batches_add_up_to_the_mean_over_all_answers_tokens(family):
    model, rows = load(family), prompts()
    total = forward_backward(model, experiment(), rows, CPU)
    found = [p.grad.clone() for p in model.parameters()]
    loss = -sum(log_likelihood(model, ids, ANSWERS[label]) for ids, _, label in rows)
    loss = loss / sum(len(ANSWERS[label]) for *_, label in rows)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_logits_are_computed_at_the_answers_tokens_alone(monkeypatch):
    model, seen = load("llama2"), []
    logits = Transformer.logits
    monkeypatch.setattr(Transformer, "logits", lambda self, h: seen.append(h.shape) or logits(self, h))
    answer_losses(model, [[7, 8, 9], [7]], [[5, 6], [5]], 0, torch.device("cpu"))
    assert seen == [(3, 8)]


# ------------------------------------------------------------------------------------------ prompts and answers


SAME = "classify the semantic similarity of the text: {}\n{}\nresult: "
BY_HAND = {  # task: (LoRA-GA's prompt and answers, T5's own)
    "mrpc": (SAME, "different equivalent", "mrpc sentence1: {} sentence2: {}", "not_equivalent equivalent"),
    "cola": ("classify the grammaticality of the text: {}\nresult: ", "unacceptable acceptable", "cola sentence: {}",
             "unacceptable acceptable"),
    "sst2": ("classify the sentiment of the text: {}\nresult: ", "negative positive", "sst2 sentence: {}", "negative positive"),
    "rte": (SAME, "entailment not_entailment", "rte sentence1: {} sentence2: {}", "entailment not_entailment"),
    "qnli": ("classify the semantic similarity of the question and the sentence: {}\n{}\nresult: ", "entailment not_entailment",
             "qnli question: {} sentence: {}", "entailment not_entailment"),
    "qqp": (SAME, "different duplicate", "qqp question1: {} question2: {}", "not_duplicate duplicate"),
    "mnli": (SAME, "entailment neutral contradiction", "mnli hypothesis: {1} premise: {0}", "entailment neutral contradiction"),
}


def test_prompts_by_hand():
    assert GENERIC.keys() == T5_OWN.keys() == BY_HAND.keys() == TASKS.keys() - {"embedded", "stsb"}
    for task, (prompt, answers, own, own_answers) in BY_HAND.items():
        assert GENERIC[task] == (prompt, tuple(answers.split())) and T5_OWN[task] == (own, tuple(own_answers.split()))
        assert len(GENERIC[task][1]) == len(T5_OWN[task][1]) == len(TASKS[task].labels)
    assert T5_OWN["mnli"][0].format("a {b}", "c") == "mnli hypothesis: c premise: a {b}"


def tokenizer(end=None):
    words = ["[PAD]", "</s>", "[UNK]", "not", "_", "equivalent", "different", "mrpc", "sentence1", "sentence2", ":", *"abcdefgh"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def test_answers_are_whole_words_and_end():
    assert train_glue.encode_answers(tokenizer(end=True), ("not_equivalent", "equivalent"), 1) == [[3, 4, 5, 1], [5, 1]]
    assert train_glue.encode_answers(tokenizer(), ("not_equivalent", "equivalent"), [6, 7]) == [[3, 4, 5, 6], [5, 6]]
    with pytest.raises(ValueError, match="the tokenizer gives two of yes, no the same tokens"):
        train_glue.encode_answers(tokenizer(), ("yes", "no"), 1)


def test_a_long_prompt_keeps_its_beginning_and_its_end():
    rows = [(("a b c d e f g h", "h g"), 1), (("a", "b"), 0)]
    (long, _, label), (short, *_) = train_glue.encode_prompts(tokenizer(end=True), rows, T5_OWN["mrpc"][0], 12)
    assert long == [7, 8, 10, 11] + [16, 17, 18, 9, 10, 18, 17, 1] and label == 1  # 16 tokens, of which 12 are kept
    assert short == [7, 8, 10, 11, 9, 10, 12, 1]
    with pytest.raises(ValueError, match="--max-length is 8; expected more than the 8"):
        train_glue.encode_prompts(tokenizer(), rows, T5_OWN["mrpc"][0], 8)


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """T5's, Flan-T5's and Llama's tiny checkpoints with a tokenizer, and MRPC files."""
    monkeypatch.chdir(tmp_path)
    for family in ("t5", "flan-t5", "llama3"):
        shutil.copytree(os.path.join(GOLDEN, family), tmp_path / family)
        tokenizer(end=family != "llama3").save(str(tmp_path / family / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    rng = random.Random(0)
    for name, size in (("train", 21), ("dev", 10)):
        rows = [f"{i % 2}\t1\t2\t{' '.join(rng.choices('abcd', k=3))}\t{rng.choice('ef') if i % 2 else rng.choice('gh')}\n"
                for i in range(size)]
        (tmp_path / "data" / f"{name}.tsv").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(rows))
    return tmp_path


RUN = ["--task", "mrpc", "--data", "data", "--rank", "2", "--aux-rank", "3", "--batch-size", "8", "--epochs", "2",
       "--max-length", "40", "--seeds", "0", "--device", "cpu"]


@pytest.mark.parametrize("family, adapted", [
    ("t5", 2 * 2 * (12 * 14 + 4 * 20)), ("llama3", 2 * 2 * (2 * 32 + 2 * 20 + 3 * 20))])
def test_runs_of_all_methods(folders, family, adapted):
    """T5: 4 stacks-worth of q, k, v, o (8 and 6 wide) a layer less one, and two MLPs; Llama: q, o 24 wide, k, v 12, three MLPs."""
    report = main([*RUN, "--model", family, "--out", "out", "--merge"])
    assert report["summary"].keys() == set(METHODS[:3]) and report["config"]["model"] == family
    logs = {}
    for run in report["results"]:
        folder = folders / "out" / f"{run['method']}-seed0"
        logs[run["method"]] = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert len(logs[run["method"]]) == 6 and all(math.isfinite(loss) for loss in logs[run["method"]])
        assert run["parameters"] == {"primary": adapted, "auxiliary": adapted * 3 // 2 if run["method"] == "bi-lora" else 0,
                                     "head": 0}
        model = Transformer.from_pretrained(folders / family)
        add_lora(model, 2, 16)
        load_adapter(model, folder, model.module_names)
        merged = Transformer.from_pretrained(folder / "merged")
        ids = torch.tensor([[7, 8, 10, 11]])
        logits, plain = (m(ids, None, None, None if m.encoder is None else ids) for m in (merged, load(family, torch.float32)))
        torch.testing.assert_close(logits, model(ids, None, None, None if model.encoder is None else ids), rtol=0, atol=1e-5)
        assert (logits - plain).abs().max() > 1e-4  # there was something to merge
        assert load_tokenizer(folder / "merged").encode("not a").ids == load_tokenizer(folders / family).encode("not a").ids
    assert logs["lora"][0] == logs["lora-sam"][0] == logs["bi-lora"][0] and logs["lora"] != logs["bi-lora"]


def test_it_learns(folders):
    """The second sentence's word gives the label away."""
    report = main([*RUN, "--model", "t5", "--method", "lora", "--rank", "4", "--epochs", "60", "--lr", "0.01", "--prompts", "t5"])
    assert report["results"][0]["metrics"]["accuracy"] == 1.0


@pytest.mark.parametrize("family", ["t5", "flan-t5", "llama3"])
@pytest.mark.parametrize("given, table", [([], GENERIC), (["--prompts", "generic"], GENERIC), (["--prompts", "t5"], T5_OWN)])
def test_the_followed_codes_prompts_are_the_default_for_every_family(folders, family, given, table):
    _, args = train_glue.parse_arguments([*RUN, "--model", family, *given])
    loaded = train_glue.load_glue(args, TASKS["mrpc"])
    made, eos = load_tokenizer(folders / family), 5 if family == "llama3" else 1
    sentences, label = train_glue.read_tsv(TASKS["mrpc"], "data/train.tsv")[0]
    assert loaded.data(0)[0][0] == (made.encode(table["mrpc"][0].format(*sentences)).ids, None, label)
    assert loaded.answers == [made.encode(word, add_special_tokens=False).ids + [eos] for word in table["mrpc"][1]]


@pytest.mark.parametrize("change, message", [
    (["--task", "stsb"], "stsb is a regression; expected an encoder"), (["--max-length", "8"], "--max-length is 8"),
    (["--max-length", "64"], "--max-length is 64, the longest answer"), (["--label-noise", "2"], "--label-noise: '2'"),
])
def test_wrong_input(folders, capsys, change, message):
    if "stsb" in change:
        for name in ("train", "dev"):
            (folders / "data" / f"{name}.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t2.5\n")
    with pytest.raises(SystemExit) as caught:
        main([*RUN, "--model", "llama3", *change])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_longest_rows_there_is_room_for(folders):
    """64 positions: 63 for the prompt and one for an answer of two tokens, whose last is not read."""
    _, args = train_glue.parse_arguments([*RUN, "--model", "llama3", "--max-length", "63"])
    assert max(map(len, train_glue.load_glue(args, TASKS["mrpc"]).answers)) == 2


def test_a_merged_checkpoint_is_rounded_once(folders):
    """A base in bfloat16: float32 arithmetic, then one rounding to what config.json names."""
    config = json.loads((folders / "llama3/config.json").read_text())
    (folders / "llama3/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    main([*RUN, "--model", "llama3", "--method", "lora", "--lr", "0.1", "--out", "out", "--merge"])
    model, merged = Transformer.from_pretrained("llama3"), Transformer.from_pretrained("out/lora-seed0/merged")
    layers = add_lora(model, 2, 16)
    load_adapter(model, "out/lora-seed0", model.module_names)
    layer, found = model.decoder.blocks[1].mlp.down, merged.decoder.blocks[1].mlp.down.weight
    exact = layer.weight + 8.0 * layer.lora_B @ layer.lora_A
    assert layer in layers and (exact - layer.weight).abs().max() > 0.01
    torch.testing.assert_close(found, exact.to(torch.bfloat16).float(), rtol=2**-7, atol=0)
    assert (found == exact.to(torch.bfloat16).float()).float().mean() > 0.95  # the sum's order may move it over an edge

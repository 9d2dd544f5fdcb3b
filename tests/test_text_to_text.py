"""T5 and decoders in the GLUE script: prompts, answers, their losses and scores, runs.

Oracles: log-softmax of one row at a time, without padding, summed token by token here; prompts
written out by hand.  The models are the tiny random ones of tests/golden/.
"""

import math
import os
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import train_glue
import train_gsm8k
from bilora import add_lora, load_adapter
from model import Transformer, load_tokenizer, read_safetensors
from test_train_glue import MRPC, PAPERS, arguments, data_of, error_of, losses
from train_glue import TASKS, answer_losses, encode, forward_backward, main, predict

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
ANSWERS = [[8, 9, 10, 12], [8, 9, 11, 12], [8]]  # the first tokens do not tell them apart

def golden(family):
    return Transformer.from_pretrained(os.path.join(GOLDEN, family), dtype=torch.float64)

def prompts(count=7):
    rng = random.Random(0)
    return [([rng.randrange(7, 40) for _ in range(rng.randint(2, 9))], None, i % 3)
            for i in range(count)]

def log_likelihood(model, prompt, answer):
    """log p(answer | prompt), a token after the other."""
    total = 0.0
    for i, token in enumerate(answer):
        if model.encoder is None:
            logits = model(torch.tensor([prompt + answer[:i]]))
        else:
            read = torch.tensor([[model.config.start_id] + answer[:i]])
            logits = model(torch.tensor([prompt]), decoder_input_ids=read)
        total = total + torch.log_softmax(logits[0, -1], -1)[token]
    return total

@pytest.mark.parametrize("family", ["t5", "flan-t5", "llama2", "llama3", "qwen2"])
@torch.no_grad()
def test_the_class_with_the_likeliest_whole_answer_is_predicted(family):
    model, rows = golden(family), prompts(10)
    expected = torch.stack([torch.stack([log_likelihood(model, ids, answer) for answer in ANSWERS])
                            for ids, *_ in rows])
    ids, answers = [ids for ids, *_ in rows for _ in ANSWERS], ANSWERS * 10
    found, padded = (-answer_losses(model, ids, answers, pad, "cpu").view(10, 3) for pad in (0, 3))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)  # a float32 loss
    assert torch.equal(found, padded)  # whatever the padding is
    data = data_of("mnli", answers=ANSWERS)
    assert predict(arguments(), model, data, rows) == expected.argmax(1).tolist()
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3  # the later tokens matter

@pytest.mark.parametrize("family", ["t5", "llama3"])
def test_micro_batches_add_up_to_the_mean_over_all_answers_tokens(family):
    model, rows = golden(family), prompts()
    total = forward_backward(arguments(), model, data_of("mnli", answers=ANSWERS), rows)
    found = [p.grad.clone() for p in model.parameters()]
    loss = -sum(log_likelihood(model, ids, ANSWERS[label]) for ids, _, label in rows)
    loss = loss / sum(len(ANSWERS[label]) for *_, label in rows)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

def test_logits_are_computed_at_the_answers_tokens_alone(monkeypatch):
    seen, logits = [], Transformer.logits

    def noted(self, h):
        seen.append(h.shape)
        return logits(self, h)

    monkeypatch.setattr(Transformer, "logits", noted)
    answer_losses(golden("llama2"), [[7, 8, 9], [7]], [[5, 6], [5]], 0, torch.device("cpu"))
    assert seen == [(3, 8)]


# ---------------------------------------------------------------------------- prompts and answers

SAME = "classify the semantic similarity of the text: {}\n{}\nresult: "
BY_HAND = {  # LoRA-GA's prompts and answers
    "mrpc": (SAME, "different equivalent"),
    "cola": ("classify the grammaticality of the text: {}\nresult: ", "unacceptable acceptable"),
    "sst2": ("classify the sentiment of the text: {}\nresult: ", "negative positive"),
    "rte": (SAME, "entailment not_entailment"),
    "qnli": ("classify the semantic similarity of the question and the sentence: {}\n{}\nresult: ",
             "entailment not_entailment"),
    "mnli": (SAME, "entailment neutral contradiction")}

def test_prompts_by_hand():
    assert BY_HAND == {name: (task.prompt, task.answers) for name, task in TASKS.items()
                       if name != "demo"}
    for name, (_, answers) in BY_HAND.items():
        assert len(answers.split()) == len(TASKS[name].labels)

def tokenizer(end=None):
    words = ["[PAD]", "</s>", "[UNK]", "not", "_", "equivalent", "different", "mrpc", "sentence1",
             "sentence2", ":", *"abcdefgh"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if end:
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)])
    return made

def test_answers_are_whole_words_and_end():
    words = ["not_equivalent", "equivalent"]
    assert train_glue.encode_answers(tokenizer(end=True), words, 1) == [[3, 4, 5, 1], [5, 1]]
    assert train_glue.encode_answers(tokenizer(), words, [6, 7]) == [[3, 4, 5, 6], [5, 6]]
    with pytest.raises(ValueError, match="the tokenizer gives two of yes, no the same tokens"):
        train_glue.encode_answers(tokenizer(), ["yes", "no"], 1)

def test_a_long_prompt_keeps_its_end():
    """The question stands there; and the special token stays."""
    rows = [(("a b c d e f g h", "h g"), 1), (("a", "b"), 0)]
    prompt = "mrpc sentence1: {} sentence2: {}"
    (long, _, label), (short, *_) = encode(tokenizer(end=True), rows, prompt, 12)
    assert long == [12, 13, 14, 15, 16, 17, 18, 9, 10, 18, 17, 1] and label == 1  # of 16 tokens
    assert short == [7, 8, 10, 11, 9, 10, 12, 1]
    with pytest.raises(ValueError, match="--max-length is 1; expected more than the 1"):
        encode(tokenizer(end=True), rows, prompt, 1)


# ------------------------------------------------------------------------------------------ runs

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """T5's, Flan-T5's and Llama's tiny checkpoints with a tokenizer, and MRPC files whose label
    the second sentence gives away."""
    monkeypatch.chdir(tmp_path)
    for family in ("t5", "flan-t5", "llama3"):
        shutil.copytree(os.path.join(GOLDEN, family), tmp_path / family)
        tokenizer(end=family != "llama3").save(str(tmp_path / family / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    rng = random.Random(0)
    for name, size in (("train", 21), ("dev", 10)):
        rows = []
        for i in range(size):
            first, second = " ".join(rng.choices("abcd", k=3)), "e" if i % 2 else "g"
            rows.append(f"{i % 2}\t1\t2\t{first}\t{second}\n")
        (tmp_path / "data" / f"{name}.tsv").write_text(MRPC + "".join(rows))
    return tmp_path

RUN = ["--task", "mrpc", "--data", "data", "--rank", "2", "--aux-rank", "3", "--batch-size", "8",
       "--epochs", "2", "--max-length", "40", "--seeds", "0", "--device", "cpu"]

@pytest.mark.parametrize("family, adapted", [
    ("t5", 2 * 2 * (12 * 14 + 4 * 20)), ("llama3", 2 * 2 * (2 * 32 + 2 * 20 + 3 * 20))])
def test_runs_of_all_methods(folders, family, adapted):
    """T5: three attentions of q, k, v, o (8 and 6 wide) a pair of layers, and two MLPs; Llama: q, o
    24 wide, k, v 12, three matrices of an MLP."""
    report = main([*RUN, "--model", family, "--out", "out"])
    assert list(report["summary"]) == list(PAPERS) and report["model"] == family
    logs = {}
    for run in report["results"]:
        folder = folders / "out" / f"{run['method']}-seed0"
        logs[run["method"]] = losses(folder)
        assert len(losses(folder)) == 6 and all(map(math.isfinite, losses(folder)))
        assert math.isfinite(run["metrics"]["rise"])
        auxiliary = adapted * 3 // 2 if run["method"] == "bi-lora" else 0
        expected = {"primary": adapted, "auxiliary": auxiliary, "head": 0, "base": 0}
        assert run["parameters"] == expected
        model = Transformer.from_pretrained(folders / family)
        add_lora(model, 2, 16)
        load_adapter(model, str(folder), model.module_names, read_safetensors)
    assert logs["lora"][0] == logs["lora-sam"][0] == logs["bi-lora"][0]
    assert logs["lora"] != logs["bi-lora"]

def test_it_learns(folders):
    shutil.copy("data/train.tsv", "data/dev.tsv")
    run = [*RUN, "--model", "t5", "--method", "lora", "--rank", "4"]
    (result,) = main([*run, "--epochs", "60", "--lr", "0.01"])["results"]
    assert result["metrics"]["accuracy"] == 1.0

def loaded(argv):
    settings, options = train_glue.SETTINGS, train_glue.GLUE_OPTIONS
    return train_glue.load(train_glue.parse_arguments(argv, "", settings, options)[0])

@pytest.mark.parametrize("family", ["t5", "flan-t5", "llama3"])
def test_every_family_reads_the_prompt_and_answers_in_words(folders, family):
    data, made = loaded([*RUN, "--model", family]), load_tokenizer(folders / family)
    with open("data/train.tsv") as file:
        label, _, _, *sentences = file.readlines()[1].rstrip("\n").split("\t")
    ids, _, found = data.rows[0]
    assert (ids, found) == (made.encode(SAME.format(*sentences)).ids, int(label))
    end = 5 if family == "llama3" else 1
    words = [made.encode(word, add_special_tokens=False).ids
             for word in ("different", "equivalent")]
    assert data.answers == [ids + [end] for ids in words]

def test_the_longest_rows_there_is_room_for(folders, capsys):
    """64 positions: 63 for the prompt and one for an answer of two tokens, whose last is not
    read."""
    run = [*RUN, "--model", "llama3", "--max-length"]
    assert max(map(len, loaded([*run, "63"]).answers)) == 2
    error = error_of(capsys, [*run, "64"])
    assert "--max-length and an answer: 65 tokens; the model has 64 positions" in error

def test_a_task_without_a_prompt_needs_an_encoder(folders, capsys):
    (folders / "data" / "train.tsv").write_text("a\t1\t\ta b\n")
    (folders / "data" / "dev.tsv").write_text("a\t1\t\ta b\n")
    error = error_of(capsys, [*RUN, "--model", "llama3", "--task", "demo"])
    assert "demo has no prompt; expected an encoder" in error

def test_prompts_of_both_scripts_are_one_functions(folders):
    """With a template that ends every text, a decoder's prompt does not end; T5's does."""
    path = folders / "llama3" / "tokenizer.json"
    made = tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[PAD] $A </s>", special_tokens=[("[PAD]", 0), ("</s>", 5)])
    made.save(str(path))
    pair, texts = [(("a b", "a b"), 1)], (SAME.format("a b", "a b"), "Q: a b\nA: ")
    ((classified, _, _),) = encode(made, pair, SAME, 40, [5, 6])
    ((generated, _, _),) = train_gsm8k.encode(made, [("a b", "e #### 5")], [5, 6])
    for ids, text in zip((classified, generated), texts):
        assert ids == made.encode(text).ids[:-1] and ids[0] == 0 and ids[-1] != 5
    assert encode(made, pair, SAME, 6, [5, 6])[0][0] == [0, *classified[-4:]]
    data = loaded([*RUN, "--model", "llama3"])
    rows = [*data.rows, *data.sets["dev"]]
    assert all(ids[0] == 0 and ids[-1] != 5 for ids, *_ in rows)
    assert {ids[-1] for ids, *_ in loaded([*RUN, "--model", "t5"]).rows} == {1}

def test_a_tokenizer_that_fails_is_one_line(folders, capsys):
    made = tokenizer()
    made.model = models.WordLevel({"[PAD]": 0}, unk_token="[UNK]")
    made.save(str(folders / "llama3" / "tokenizer.json"))
    error = error_of(capsys, [*RUN, "--model", "llama3"])
    assert "the tokenizer: WordLevel error: Missing [UNK]" in error
    with pytest.raises(ValueError, match="the tokenizer gives no token for 'x'"):
        train_glue.encode_answers(Tokenizer(models.BPE()), ["x"], 1)

@pytest.mark.parametrize("family, pad", [("llama3", "<pad>"), ("t5", "[PAD]")])
def test_the_padding_token_needs_no_embedding(folders, family, pad):
    """Padding is masked: its id may be the size of the vocabulary."""
    main([*RUN, "--model", family, "--method", "lora", "--out", "first"])
    path = folders / family / "tokenizer.json"
    made = Tokenizer.from_file(str(path))
    words = {word: i for word, i in made.get_vocab().items() if word != "[PAD]"}
    made.model = models.WordLevel({**words, pad: 40}, unk_token="[UNK]")
    made.save(str(path))
    assert load_tokenizer(folders / family).padding["pad_id"] == 40
    main([*RUN, "--model", family, "--method", "lora", "--out", "second"])
    assert losses(folders / "first/lora-seed0") == losses(folders / "second/lora-seed0")

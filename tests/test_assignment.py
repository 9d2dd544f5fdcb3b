"""The course: notes/assignment.py, mistakes.py, solutions.md, toy.py.  What a copy keeps and lacks,
what the check says, that mistakes are found out, that the solutions' numbers are right.

Oracles: the project's own sources, compared as syntax trees; pytest in a copy; steps written out.
"""

import ast
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from test_parallel import START
from test_train_glue import error_of

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import assignment  # noqa: E402
import mistakes  # noqa: E402
import toy  # noqa: E402
from assignment import PROJECT, TASKS  # noqa: E402
from mistakes import MISTAKES  # noqa: E402

OURS = {os.path.realpath(os.path.join(PROJECT, part)) for part in ("", "notes", "tests")}


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


def bodies(source):
    """{qualified name: (signature, docstring, the body after it)}."""
    found = {}
    for node, name in assignment.definitions(ast.parse(source)):
        text = ast.get_docstring(node)
        body = node.body[1 if text else 0:]
        found[name] = ast.dump(node.args), text, [ast.dump(line) for line in body]
    return found


@pytest.mark.parametrize("name", TASKS)
def test_a_blank_keeps_signature_and_docstring_and_all_else(name):
    task = TASKS[name]
    source = read(PROJECT, task.file)
    blank = assignment.blanked(source, name, task.functions)
    before, after = bodies(source), bodies(blank)
    assert before.keys() == after.keys()
    for function in before:
        if function in task.functions:
            assert before[function][:2] == after[function][:2]
            (line,) = after[function][2]
            assert "NotImplementedError" in line and f"{name}: yours to write" in line
        else:
            assert before[function] == after[function]
    outside = [line for line in source.splitlines() if line.startswith("@")]
    assert [line for line in blank.splitlines() if line.startswith("@")] == outside


def test_every_grading_test_exists_and_names_a_task_once():
    for task in TASKS.values():
        assert len(set(task.tests)) == len(task.tests)
        for test in task.tests:
            file, name = test.split("::")
            assert f"\ndef {name}(" in read(PROJECT, "tests", file), test


def forked(command, cwd, timeout, env, **options):
    """subprocess.run of `python -m pytest ...` in a fork: torch is imported already, nothing of
    this project is."""
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "output")
        child = multiprocessing.get_context("fork").Process(
            target=pytest_of, args=(command[3:], cwd, env, output))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, child.exitcode, "", read(output))


def pytest_of(words, cwd, env, output):
    """In the fork, which has none of the threads of its parent."""
    torch.set_num_threads(1)
    for end in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), end)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(cwd)
    os.environ |= env
    for name, module in list(sys.modules.items()):
        if os.path.dirname(os.path.realpath(getattr(module, "__file__", None) or "/")) in OURS:
            del sys.modules[name]
    sys.path = [cwd, *(path for path in sys.path if os.path.realpath(path) not in OURS)]
    sys.exit(pytest.main(words))


@pytest.fixture
def quick(monkeypatch):
    """Tests of a copy need no new interpreter."""
    if START == "fork" and sys.platform == "linux":
        mine = SimpleNamespace(run=forked, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(assignment, "subprocess", mine)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy with four blanks; the first is written again, the second and the last wrongly."""
    folder = tmp_path_factory.mktemp("student") / "copy"
    assignment.main([str(folder), "--blank", "lora_step", "clip_perturbation_", "merge_lora_",
                     "filter_normalised"])
    return folder


def test_a_copy_for_a_sheet_lacks_what_later_ones_ask_for(tmp_path, quick):
    """Its own tests pass with the later functions missing."""
    assert list(assignment.sheets()) == [1, 2, 3, 5, 6, 7]
    names, later, text = assignment.of_sheet(5)
    assert names == ["perturbation_norm", "clip_perturbation_"]
    assert later == ["bilora_step", "power_rule"]
    links = [link for number in assignment.sheets()
             for link in re.findall(r"\]\(([^)#]*)", assignment.of_sheet(number)[2])]
    assert len(links) > 6 and all(os.path.exists(os.path.join(PROJECT, link)) for link in links)
    assignment.main([str(tmp_path / "copy"), "--sheet", "1"])
    sheet = read(tmp_path, "copy", "SHEET.md")
    assert sheet.startswith("# Sheet 1. LoRA's gradients by hand\n") and "* b (3) W₀" in sheet
    assert re.findall(r"^## (\w+)$", sheet, re.MULTILINE) == ["forward", "lora_step"]
    source = read(tmp_path, "copy", "bilora.py")
    missing = set(re.findall(r'"(\w+): yours to write"', source))
    assert missing == {name for name, task in TASKS.items() if task.file == "bilora.py"} - {
        "add_lora"}
    source = read(PROJECT, "bilora.py")
    for name in missing - {"forward", "lora_step"}:
        source = assignment.blanked(source, name, TASKS[name].functions)
    (tmp_path / "copy" / "bilora.py").write_text(source)
    found = assignment.check(tmp_path / "copy")
    assert found.keys() == {"forward", "lora_step"}
    assert all(passed == count > 0 for passed, count, _ in found.values()), found


def test_the_check_says_what_is_done_wrong_and_not_begun(copy, capsys, quick):
    assert not {"solutions.md", "mistakes.py"} & set(os.listdir(copy / "notes"))
    sheet = read(copy, "SHEET.md")
    assert [line for line in sheet.splitlines() if line.startswith("## ")] == [
        "## lora_step", "## clip_perturbation_", "## merge_lora_", "## filter_normalised"]
    source, path = read(PROJECT, "bilora.py"), copy / "bilora.py"
    wrong = source.replace("torch.sqrt(rho / c), 1.0", "rho / c, 1.0")
    path.write_text(assignment.blanked(wrong, "merge_lora_", TASKS["merge_lora_"].functions))
    (copy / "tests/test_steps.py").write_text("")  # a student's own tests grade nothing
    wrong = read(PROJECT, "notes", "measures.py").replace("torch.randn(w.", "torch.rand_(w.")
    (copy / "notes/measures.py").write_text(wrong)
    line = 1 + wrong[:wrong.index("torch.rand_(")].count("\n")
    found = assignment.check(copy)
    assert found["lora_step"][:2] == (1, 1) and found["merge_lora_"][0] == 0
    passed, count, (message,) = found["clip_perturbation_"]
    assert passed < count and message.startswith("test_steps.py::test_clip_is_global")
    assert "Eq. (10), all B2 A2 at rho = c / 7: off by up to " in message
    (message,) = found["filter_normalised"][2]
    assert "AttributeError" in message and message.endswith(f"(notes/measures.py:{line})")
    assignment.report_of(found)
    printed = capsys.readouterr().out
    assert "lora_step: done; 1 of 1 cases pass" in printed
    assert "merge_lora_: not begun" in printed and "clip_perturbation_: not yet; " in printed
    path.write_text("def (:\n")
    argv = [str(copy), "--check"]
    assert 'File "bilora.py", line 1 SyntaxError: ' in error_of(capsys, argv, assignment.main)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "LIMIT", 0.1)
        assert "did not end within 0.1 seconds" in error_of(capsys, argv, assignment.main)
    shutil.copy(os.path.join(PROJECT, "tests", "test_steps.py"), copy / "tests")
    path.write_text(source)


def test_a_file_handed_in_alone(tmp_path, capsys):
    """For the tasks that are named; notes/measures.py lies in its folder."""
    os.mkdir(tmp_path / "notes")
    source = read(PROJECT, "notes", "measures.py")
    argv = [str(tmp_path), "--check", "--blank", "hessian_vector"]
    assert "measures.py" in error_of(capsys, argv, assignment.main)
    (tmp_path / "notes/measures.py").write_text("import nothing\n" + source)
    assert assignment.main(argv) == 1
    printed = capsys.readouterr().out
    assert "hessian_vector: its tests could not start\n    notes/measures.py:1: in " in printed
    assert "'nothing'" in printed


@pytest.mark.parametrize("own, text, place", [
    ({"bilora.py:306"}, "bilora.py:306: \nbilora.py:324: TypeError", " (bilora.py:306)"),
    (set(), "bilora.py:306: \nbilora.py:324: TypeError", " (bilora.py:324)"),
    (set(), "bilora.py:306: \n/usr/lib/torch/x.py:9: TypeError", " (bilora.py:306)"),
    ({"bilora.py:306"}, "bilora.py:306: \ntests/test_steps.py:7: AssertionError", "")])
def test_the_place_of_an_error_is_the_students_line(own, text, place):
    """A call of a helper with wrong arguments fails in the helper; an assertion has no place."""
    case = ET.Element("testcase", classname="tests.test_steps", name="test_clip[1]")
    ET.SubElement(case, "failure", message="TypeError: no\nmore").text = (
        f"tests/test_steps.py:5: \n{text}\n")
    assert assignment.message_of(case, own) == f"test_steps.py::test_clip: TypeError: no{place}"


def test_of_a_refusal_in_other_words_the_expected_ones_are_said():
    case = ET.Element("testcase", classname="tests.test_steps", name="test_radius")
    message = "AssertionError: Regex pattern did not match.\n  Regex: 'rho is'\n  Input: 'no'\nmore"
    ET.SubElement(case, "failure", message=message).text = "tests/test_steps.py:5: \n"
    assert assignment.message_of(case, ()) == (
        "test_steps.py::test_radius: AssertionError: Regex pattern did not match. Regex: 'rho is' "
        "Input: 'no'")


def test_other_tests_of_a_copy_pass_or_are_skipped(copy, quick):
    """What meets a blank on its way is skipped; nothing fails but what grades it."""
    path, before = copy / "bilora.py", read(copy, "bilora.py")
    source = read(PROJECT, "bilora.py")
    for task in ("clip_perturbation_", "perturbation_norm"):  # the second is not this copy's task
        source = assignment.blanked(source, task, TASKS[task].functions)
    path.write_text(source)
    graders = TASKS["clip_perturbation_"].tests
    others = ["test_steps.py::test_bilora_step_eq_9_10", "test_steps.py::test_lora_step_eq_2",
              "test_steps.py::test_negative_radius",
              "test_steps.py::test_gram_norm_equals_dense_norm"]
    cases = assignment.run_tests(copy, [*graders, *others])
    outcome = {}
    for case in cases:
        tag = case[0].tag if len(case) else "passed"
        outcome.setdefault(assignment.name_of(case), set()).add(tag)
    path.write_text(before)
    assert all("failure" in outcome[test] for test in graders)
    assert outcome[others[0]] == outcome[others[3]] == {"skipped"}
    assert outcome[others[1]] == {"passed"}
    assert not {"failure", "error"} & set().union(*(outcome[test] for test in others))


def test_every_mistake_is_a_patch_that_compiles():
    assert len(MISTAKES) >= 40 and {mistake.task for mistake in MISTAKES.values()} == {*TASKS}
    for name, mistake in MISTAKES.items():
        source = read(PROJECT, TASKS[mistake.task].file)
        patched = mistakes.patched(source, mistake)
        assert patched != source
        compile(patched, name, "exec")


@pytest.mark.parametrize("name", ["one factor alone"])
def test_mistakes_are_found_out(name, quick):
    """A sample; `python notes/mistakes.py` takes all."""
    found, messages = mistakes.found_out(name)
    assert found, messages


@pytest.mark.parametrize("argv, message", [
    (["here"], "exists; expected the name of a new folder"), ([], "expected the folder"),
    (["here", "--check"], "names no task; expected a folder that this command has written"),
    (["new", "--blank", "all"], "invalid choice"),
    (["new", "--sheet", "4"], "--sheet is 4; expected one with a task: 1, 2, 3, 5, 6, 7"),
    (["here", "--check", "--sheet", "0"], "--sheet is 0; expected one with a task"),
    (["new", "--sheet", "3", "--blank", "forward"], "not allowed with")])
def test_wrong_input(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("here")
    assert message in error_of(capsys, argv, assignment.main)
    assert os.listdir() == ["here"]


SOLUTIONS = read(PROJECT, "notes", "solutions.md")
SECTIONS = {part.splitlines()[0]: part for part in SOLUTIONS.split("\n## ")[1:]}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_solutions_numbers(section):
    names = {}
    for block in re.findall(r"^    (import .*\n(?:    .*\n)*)", SOLUTIONS, re.MULTILINE)[:1]:
        exec(block.replace("\n    ", "\n"), names)
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(block, names)


def test_every_exercise_has_a_solution():
    for name in sorted(os.listdir(os.path.join(PROJECT, "notes"))):
        if re.match(r"[1-6]_.*\.md", name):
            text = read(PROJECT, "notes", name).split("## Exercises")[1]
            exercises = re.findall(r"^(\d)\. ", text, re.MULTILINE)
            section = next(text for title, text in SECTIONS.items()
                           if title.startswith(f"Note {name[0]},"))
            assert re.findall(r"^\*\*(\d)\.\*\*", section, re.MULTILINE) == exercises, name
    sheets = re.findall(r"^## (\d)\. ", read(PROJECT, "notes", "assignments.md"), re.MULTILINE)
    assert sheets == [*"12345678"]


def test_points_add_up():
    text = read(PROJECT, "notes", "assignments.md")
    total = 0
    for sheet in text.split("\n## ")[1:]:
        points = int(re.search(r"(\d+) points", sheet)[1])
        parts = [int(n) for n in re.findall(r"^\* [a-d] \((\d+)", sheet, re.MULTILINE)]
        assert sum(parts) == points, sheet[:20]
        total += points
        for task in re.findall(r"Tasks? (.*?)\. Hand", sheet):
            assert set(re.findall(r"`(\w+)`", task)) <= set(TASKS)
    assert total == 100


def test_the_toy_takes_the_steps_and_ends_where_note_5_says(tmp_path, monkeypatch):
    """Oracle: the steps written out on 2 x 2 matrices, and 4 and 5 of the worked example."""
    assert len(read(PROJECT, "notes", "toy.py").splitlines()) <= 80
    W0, H = torch.tensor([[-1.0, 0.0], [0.0, -2.0]]), toy.CURVATURE
    B, A = torch.tensor([[0.3], [0.9]]), torch.tensor([[0.5, 0.4]])
    G = H * (W0 + B @ A)
    after = W0 + (B - 0.15 * G @ A.T) @ (A - 0.15 * B.T @ G)
    before, seen, found = toy.walk("LoRA")[0]
    assert torch.equal(seen, before) and torch.allclose(found, after, atol=1e-6)
    size = math.hypot((G @ A.T).norm(), (B.T @ G).norm())
    at = W0 + (B + 0.3 / size * G @ A.T) @ (A + 0.3 / size * B.T @ G)
    assert torch.allclose(toy.walk("LoRA-SAM")[0][1], at, atol=1e-6)
    assert torch.equal(toy.walk("Bi-LoRA")[0][1], before)  # B2 = 0: nothing is perturbed yet
    assert not torch.allclose(toy.walk("Bi-LoRA")[1][1], toy.walk("Bi-LoRA")[1][0], atol=0.1)
    plain, power = toy.gains(torch.optim.SGD), toy.gains(None, 30)
    assert plain[-1] == pytest.approx(4, abs=1e-2) and max(plain) > 4.4
    assert power[-1] == pytest.approx(5, abs=1e-4)
    toy.draw(str(tmp_path / "toy.png"))
    assert os.path.getsize(tmp_path / "toy.png") > 5000

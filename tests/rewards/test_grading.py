"""Untrusted answers: one that hangs, crashes, eats memory or attacks costs itself, and nothing else."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aesl_trl.errors import InputError
from aesl_trl.rewards import grading
from aesl_trl.rewards.grading import GRADERS, MAX_CHARS, SELF_TEST, Answer, Grade, Graders
from aesl_trl.rewards.maths import math_reward


TOWER = r"\boxed{5^{5^{5^{5^{5}}}}}"
RIGHT, WRONG = Grade(1.0), Grade(0.0)


def math(text, solution="$2$"):
    return Answer("accuracy_reward", text, solution)


def pids(graders):
    return [child.process.pid for child in graders._children]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(children, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_running, children)):
        time.sleep(0.02)
    return [pid for pid in children if is_running(pid)]


def run_script(text, **options):
    """`text` in a fresh interpreter: no threads, no torch, and free to fork or to die."""
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-c", text], **options)


@pytest.fixture(scope="module")
def graders():
    graders = Graders(2)
    yield graders
    grading._kill(graders._children)


# ---- Grades are TRL's


@pytest.mark.parametrize("name", GRADERS)
def test_grades_are_those_of_the_reward_itself(graders, name):
    from trl import rewards

    texts = [
        SELF_TEST[0],
        r"</think> \boxed{\frac{4}{2}}",
        r"\boxed{2}",
        r"<think></think>\boxed{3}",
        "",
        "<think>\nso $2$",
        "I do not know",
    ]
    solutions = ["$2$", "2", r"$\frac{6}{3}$", "$2$", "$2$", "no maths here", None]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    reward = math_reward if name == "math_reward" else getattr(rewards, name)
    truth = reward(completions=messages, solution=solutions)
    assert {0.0, 1.0} <= set(truth)
    grades = graders.grade([Answer(name, *pair) for pair in zip(texts, solutions, strict=True)], 10.0)
    assert grades == [Grade(reward) for reward in truth]


def test_the_power_tower_costs_its_deadline_and_nothing_else(graders):
    rest = [math(rf"\boxed{{{number}}}") for number in (2, 3, 2, 2)]
    start = time.monotonic()
    grades = graders.grade([math(TOWER), *rest], 2.0)
    assert grades == [Grade(0.0, "timeout"), RIGHT, WRONG, RIGHT, RIGHT]
    assert time.monotonic() - start >= 2.0
    assert graders.grade(rest, 10.0) == [RIGHT, WRONG, RIGHT, RIGHT]


@pytest.mark.parametrize(
    "text",
    ["\0", "\ud800", "\udcff\ud83d", "\n\r\x0b\x85\u2028", '"]\n["accuracy_reward"', "\x1b[2J", "ÿþ\ufeff", "𝟚" * 99],
)
def test_odd_characters_do_not_leave_their_answer(graders, text):
    answers = [math(text, text), math(text + r"\boxed{2}"), Answer("think_format_reward", text, None)]
    before = graders.grade([math(r"\boxed{2}")] * 2, 10.0)
    children = pids(graders)
    grades = graders.grade(answers, 10.0)
    assert [grade.failure for grade in grades] == [None] * 3 and grades[1:] == [RIGHT, WRONG]
    assert graders.grade([math(r"\boxed{2}")] * 2, 10.0) == before == [RIGHT] * 2
    assert pids(graders) == children


def test_what_is_too_long_is_not_parsed(graders):
    digits = r"\boxed{" + "9" * 10_000_000 + "}"
    start = time.monotonic()
    assert graders.grade([math(digits), math(r"\boxed{2}", digits)], 10.0) == [Grade(0.0, "too long")] * 2
    assert time.monotonic() - start < 5.0  # 10 s is its deadline
    padded = " " * (MAX_CHARS - 9) + r"\boxed{2}"
    assert len(padded) == MAX_CHARS
    assert graders.grade([math(padded), math(padded + " ")], 60.0) == [RIGHT, Grade(0.0, "too long")]


# ---- Nothing is evaluated

PAYLOADS = [
    "__import__('os').system('touch evaluated')",
    "__import__('pathlib').Path('evaluated').touch()",
    "open('evaluated', 'w')",
    "exec('import evaluated')",
    "().__class__.__bases__[0].__subclasses__()[0]('evaluated')",
    "evaluated",
    r"\_\_import\_\_('os').system('touch evaluated')",
]
PLACES = [
    "%s",
    "answer: %s",
    r"\boxed{%s}",
    "$%s$",
    r"\[%s\]",
    "The final answer is $%s$. I hope",
    r"\boxed{\text{%s}}",
    r"\boxed{\operatorname{%s}(2)}",
    r"\boxed{\mathrm{%s} + 2}",
    r"\boxed{\frac{%s}{2}}",
    r"\boxed{x_{%s} = 2}",
    r"\boxed{\{%s, 2\}}",
    r"\boxed{\begin{pmatrix}%s & 2 \\ 3 & 4\end{pmatrix}}",
    r"\boxed{\sum_{i=1}^{2} %s}",
    r"\boxed{2\%% %s}",
]
HOSTILE = [place % payload for place in PLACES for payload in PAYLOADS]


def test_no_text_of_a_completion_or_solution_is_run(tmp_path):
    """Seen from inside Python, without the fences of a child: nothing that is compiled holds a word of the texts."""
    script = f"""
import ast, sys
from trl.rewards import accuracy_reward
def watch(event, args):
    if event == "compile" and args[0] is not None:
        source = ast.dump(args[0]) if isinstance(args[0], ast.AST) else str(args[0])
        seen.append("evaluated" in source or "__import__(" in source)
    elif event in ("os.system", "subprocess.Popen"):
        seen.append(True)
seen = []
sys.addaudithook(watch)
compile("evaluated", "", "eval")
assert seen == [True]
seen.clear()
texts = {HOSTILE!r}
for solution in ("$2$", "$x$"):
    accuracy_reward([[{{"content": text}}] for text in texts], [solution] * len(texts))
accuracy_reward([[{{"content": "$2$"}}]] * len(texts), texts)
print(any(seen), len(seen))
"""
    result = run_script(script, cwd=tmp_path)
    assert result.stdout.split()[0] == "False", result.stderr
    assert int(result.stdout.split()[1]) > 0  # the digits of numbers, which sympy evaluates
    assert list(tmp_path.iterdir()) == []


def test_hostile_texts_write_nothing_and_earn_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graders = Graders(1)
    grades = graders.grade([math(text, "$7$") for text in HOSTILE], 10.0)
    assert {(grade.reward, grade.failure) for grade in grades} == {(0.0, None)}
    assert list(tmp_path.iterdir()) == []


# ---- A child that fails, for any reason: a stand-in for TRL whose grader runs its completion

STAND_IN = """
leak = []
def accuracy_reward(completions, solution, **kwargs):
    text = completions[0][0]["content"]
    if text.startswith("RUN "):
        exec(text.removeprefix("RUN "), globals())
    return [1.0]
reasoning_accuracy_reward = think_format_reward = accuracy_reward
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Graders whose children find this `trl`, the fences around them real."""

    def build(source=STAND_IN, size=1, **options):
        (tmp_path / "trl").mkdir()
        (tmp_path / "trl" / "__init__.py").write_text("")
        (tmp_path / "trl" / "rewards.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        built.append(Graders(size, **options))
        return built[-1]

    built = []
    yield build
    for graders in built:
        grading._kill(graders._children)


def run(code):
    return math("RUN " + code)


FAILURES = {
    "bytearray(2**30)": "memory",
    "raise MemoryError": "memory",
    "import os; os._exit(0)": "crash",
    "import signal; signal.raise_signal(signal.SIGSEGV)": "crash",
    "while True: pass": "timeout",
    "import time; time.sleep(60)": "timeout",
    "x = 7**(7**9)": "timeout",
    "raise ValueError('no')": "ValueError",
    "raise SystemExit(0)": "SystemExit",
    "raise BaseException": "BaseException",
    "def f(): f()\nf()": "RecursionError",
    "open('written', 'w')": "PermissionError",
    "import os; os.open('written', os.O_CREAT)": "PermissionError",
    "import os; os.system('touch written')": "PermissionError",
    "import os; os.fork()": "PermissionError",
    "import os; os.remove('keep')": "PermissionError",
    "import subprocess; subprocess.run(['touch', 'written'])": "PermissionError",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "PermissionError",
    "import ctypes; ctypes.CDLL(None)": "PermissionError",
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_costs_one_answer(stand_in, tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    Path("keep").write_text("")
    plain = math("plain")
    grades = stand_in().grade([plain, run(code), plain, plain], 1.0)
    assert grades == [RIGHT, Grade(0.0, FAILURES[code]), RIGHT, RIGHT]
    assert Path("keep").exists() and not Path("written").exists()


@pytest.mark.parametrize(
    "code",
    [
        r"print('[0.0, null, false]\n' * 9, flush=True)",
        r"import os; os.write(1, b'[0.0, null, false]\n'); os.write(2, b'x'); assert os.read(0, 9) == b''",
        "import sys; sys.stdin.read(); sys.stderr.write('x')",
    ],
)
def test_nothing_that_is_printed_passes_for_an_answer(stand_in, capfd, code):
    graders = stand_in()
    assert graders.grade([run(code), math("plain"), math("plain")], 5.0) == [RIGHT] * 3
    assert capfd.readouterr() == ("", "")


def test_what_an_import_prints_is_no_answer(stand_in, capfd):
    assert stand_in("print('[0.0, null, false]')" + STAND_IN).grade([math("plain")], 5.0) == [RIGHT]
    assert capfd.readouterr() == ("", "[0.0, null, false]\n")


def test_the_limits_of_a_child(stand_in):
    graders = stand_in(memory_mb=100)
    graders.grade([math("plain")], 5.0)
    (pid,) = pids(graders)
    limits = {line[:25].strip(): line[25:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert limits["Max core file size"] == limits["Max file size"] == "0"
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    assert abs(int(limits["Max address space"]) - size - 100 * 2**20) < 20 * 2**20
    assert 6 <= int(limits["Max cpu time"]) < 12  # what it has used, five seconds and a spare one
    assert os.getsid(pid) == pid  # no Ctrl-C reaches it


def test_a_child_whose_memory_grows_is_replaced_in_time(stand_in):
    """Four times 40 MB are more than 100 MB, yet no answer fails."""
    graders = stand_in(memory_mb=100)
    grow = run("leak.append(bytearray(40 * 2**20))")
    children = set()
    for _ in range(4):
        assert graders.grade([grow], 5.0) == [RIGHT]
        children |= set(pids(graders))
    assert len(children) == 2


def test_a_child_that_died_between_batches_costs_nothing(stand_in):
    graders = stand_in()
    graders.grade([math("plain")], 5.0)
    os.kill(pids(graders)[0], signal.SIGKILL)
    graders._children[0].process.wait()
    assert graders.grade([math("plain")] * 2, 5.0) == [RIGHT] * 2


def test_an_answer_whose_child_somebody_else_killed_is_graded_again(stand_in):
    graders = stand_in()
    assert graders.grade([math("plain")], 5.0) == [RIGHT]
    strike = threading.Timer(0.5, os.kill, [pids(graders)[0], signal.SIGKILL])
    strike.start()
    assert graders.grade([run("import time; time.sleep(2)"), math("plain")], 60.0) == [RIGHT, RIGHT]
    strike.join()
    twice = run("import signal; signal.raise_signal(signal.SIGKILL)")
    assert graders.grade([twice, math("plain")], 60.0) == [Grade(0.0, "crash"), RIGHT]


def test_a_child_that_somebody_stops_costs_its_answer(stand_in):
    graders = stand_in()
    assert graders.grade([math("plain")], 5.0) == [RIGHT]
    os.kill(pids(graders)[0], signal.SIGSTOP)
    assert graders.grade([math("plain")] * 2, 1.0) == [Grade(0.0, "timeout"), RIGHT]


def test_a_child_that_nobody_kills_is_stopped_by_its_cpu_limit(stand_in):
    graders = stand_in()
    graders.grade([math("plain")], 5.0)
    (child,) = graders._children
    child.send(0, run("while True: pass"), 0.5)
    assert child.process.wait(timeout=30) == -signal.SIGXCPU
    assert child.hear(is_late=False) == (0, Grade(0.0, "timeout"))


def test_a_pool_shares_a_batch(stand_in):
    """While one child hangs, the other grades the rest; a small batch starts no more children than it has answers."""
    graders = stand_in(size=2)
    assert graders.grade([math("plain")], 5.0) == [RIGHT] and len(pids(graders)) == 1
    start = time.monotonic()
    grades = graders.grade([run("import time; time.sleep(60)")] * 2 + [math("plain")] * 20, 6.0)
    assert grades == [Grade(0.0, "timeout")] * 2 + [RIGHT] * 20
    assert time.monotonic() - start < 12.0  # both waits at once


@pytest.mark.parametrize(
    "source", ["raise ImportError('broken')", STAND_IN.replace("1.0", "0.0"), "import os; os._exit(7)"]
)
def test_graders_that_cannot_start_say_so(stand_in, capfd, source):
    graders = stand_in(source)
    with pytest.raises(InputError, match=r"did not start \(exit code [17]\)") as caught:
        graders.grade([math("plain")], 5.0)
    assert "\n" not in str(caught.value) and graders._children == []
    assert source.startswith("import os") or "broken" in (text := capfd.readouterr().err) or "reinstall" in text


@pytest.mark.parametrize("times", [2, 99])
def test_a_child_killed_while_it_starts_is_tried_again(stand_in, times):
    """The kernel may kill it for memory, while a hung one is replaced; that must not end the training at once."""
    killed = (
        "import os, pathlib\n"
        "tried = pathlib.Path(__file__).with_name('tried')\n"
        "number = int(tried.read_text()) if tried.exists() else 0\n"
        "tried.write_text(str(number + 1))\n"
        f"if number < {times}:\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    graders = stand_in(killed + STAND_IN)
    if times < grading.START_TRIES:
        assert graders.grade([math("plain")], 5.0) == [RIGHT]
    else:
        with pytest.raises(InputError, match=r"did not start \(exit code -9\)"):
            graders.grade([math("plain")], 5.0)
        assert graders._children == []


# ---- Threads, forks and ends


def test_threads_grade_at_once(graders):
    """More threads than children; each gets its own grades, and children outlive the thread that started them."""
    results = {}

    def work(number):
        answers = [math(rf"\boxed{{{number}}}", f"${other}$") for other in range(6)]
        results[number] = graders.grade(answers, 20.0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [RIGHT if number == other else WRONG for other in range(6)] for number in range(6)}
    children = pids(graders)
    assert graders.grade([math(r"\boxed{2}")] * 2, 10.0) == [RIGHT] * 2 and pids(graders) == children


def test_an_interrupted_batch_leaves_no_answer_behind(graders):
    def interrupt(*_):
        raise KeyboardInterrupt

    graders.grade([math(r"\boxed{2}")] * 2, 10.0)
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            graders.grade([math(TOWER)] * 3, 60.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert graders._children == []
    assert graders.grade([math(r"\boxed{3}"), math(r"\boxed{2}")], 10.0) == [WRONG, RIGHT]


def test_a_forked_process_grades_with_children_of_its_own(stand_in, tmp_path):
    stand_in()
    result = run_script(
        """
import os
from aesl_trl.rewards.grading import SHARED_GRADERS as graders, Answer, Grade
def grade():
    assert graders.grade([Answer("accuracy_reward", "plain", "")] * 3, 5.0) == [Grade(1.0)] * 3
    return [child.process.pid for child in graders._children]
first = grade()
graders._lock.acquire()  # as if another thread were grading
child = os.fork()
if child == 0:
    assert not set(grade()) & set(first)
    raise SystemExit(7)
graders._lock.release()
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, grade() == first)
"""
    )
    assert result.stdout.split() == ["7", "True"], result.stderr


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "sys.exit()"])
def test_children_end_with_their_parent(stand_in, end):
    """The idle one and the one inside a long multiplication, whose deadline is far."""
    stand_in()
    result = run_script(
        f"""
import os, signal, sys, threading, time
from aesl_trl.rewards.grading import Answer; from aesl_trl.rewards.grading import Graders
graders = Graders(2)
plain, endless = (Answer("accuracy_reward", text, "") for text in ("plain", "RUN x = 7**(7**9)"))
while len(graders._children) < 2 or not all(child.is_idle for child in graders._children):
    graders.grade([plain] * 4, 600.0)
threading.Thread(target=graders.grade, args=([endless], 600.0), daemon=True).start()
while not any(child.is_busy for child in graders._children):
    time.sleep(0.01)
time.sleep(0.3)
print(*(child.process.pid for child in graders._children), flush=True)
{end}
"""
    )
    children = [int(pid) for pid in result.stdout.split()]
    assert len(children) == 2, result.stderr
    assert wait_until_gone(children, 5.0) == []


def test_children_end_with_their_graders(stand_in):
    graders = stand_in()
    copied = pickle.loads(pickle.dumps(graders))
    copied.grade([math("plain")], 5.0)
    (pid,) = pids(copied)
    assert is_running(pid)
    del copied
    assert not Path(f"/proc/{pid}").exists()  # ended and collected


def test_graders_travel_without_their_children(graders):
    assert pickle.loads(pickle.dumps(grading.SHARED_GRADERS)) is grading.SHARED_GRADERS
    assert copy.deepcopy(grading.SHARED_GRADERS) is grading.SHARED_GRADERS
    copied = pickle.loads(pickle.dumps(graders))
    assert copied is not graders and copied._children == [] and copied.size == 2


@pytest.mark.parametrize(
    ("cores", "processes", "size"), [(64, None, 4), (3, None, 3), (1, "1", 1), (8, "4", 2), (8, "64", 1)]
)
def test_the_size_of_a_pool(monkeypatch, cores, processes, size):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert grading._default_size() == size

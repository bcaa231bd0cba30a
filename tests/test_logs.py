"""`etha.cli.logs`, and the logging of the library: who hears what, and who never waits for it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

import etha
from etha.cli.logs import AsideHandler, JsonFormatter, TextFormatter

AGENT = [sys.executable, "-m", "etha", "agent"]


def record(message: str, *args: object, exc_info: object = None) -> logging.LogRecord:
    return logging.LogRecord("etha.x", logging.WARNING, __file__, 1, message, args, exc_info)


def lines_of(agent) -> list[dict]:
    return [json.loads(line) for line in agent.errors.read_text().splitlines()]


# -- the library -------------------------------------------------------------------------------------------------------


def test_the_library_installs_no_handler_that_says_anything():
    (handler,) = logging.getLogger("etha").handlers
    assert type(handler) is logging.NullHandler
    assert logging.getLogger("etha").level == logging.NOTSET


def test_a_program_that_configures_no_logging_hears_nothing():
    code = "import etha, logging; logging.getLogger('etha.tensor_bus.agent').error('said'); etha.setup_ptrace()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_configures_logging_hears_warnings():
    code = "import etha, logging; logging.basicConfig(); etha.setup_ptrace()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("WARNING:etha.tensor_bus.bootstrap:")


def test_each_module_has_one_logger_of_its_own_name():
    loggers = {
        name: vars(module)["logger"].name
        for name, module in sys.modules.items()
        if name.startswith("etha") and isinstance(vars(module).get("logger"), logging.Logger)
    }
    assert {"etha.tensor_bus.bootstrap", "etha.cli.logs"} <= set(loggers)
    assert all(name == logger for name, logger in loggers.items())
    assert etha.__name__ == "etha"


def test_a_record_is_one_line_of_text_whatever_it_tells():
    """A worker's bytes, as a refusal quotes them, cannot look like a line of the agent's, nor act on a terminal."""
    line = TextFormatter("%(levelname)s: %(message)s").format(record("%s", "a\nERROR: b\x1b[2J\u202ec \udcff é"))
    assert line == "WARNING: a\\nERROR: b\\x1b[2J\\u202ec \\udcff é"
    try:
        raise ValueError("a mistake")
    except ValueError:
        lines = TextFormatter("%(message)s").format(record("it failed", exc_info=sys.exc_info())).splitlines()
    assert (lines[0], lines[-1]) == ("it failed", "ValueError: a mistake")


# -- JSON lines --------------------------------------------------------------------------------------------------------


def test_a_record_is_one_line_of_json():
    said = json.loads(JsonFormatter().format(record('%s said\n"%s"', "pid 3", "hé")))
    assert list(said) == ["time", "level", "logger", "message", "pid", "exception"]
    assert (said["level"], said["logger"], said["message"]) == ("WARNING", "etha.x", 'pid 3 said\n"hé"')
    assert (said["pid"], said["exception"]) == (os.getpid(), None)
    moment = datetime.fromisoformat(said["time"])
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60


def test_an_exception_is_told_whole():
    try:
        raise ValueError("a mistake")
    except ValueError:
        line = JsonFormatter().format(record("it failed", exc_info=sys.exc_info()))
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: a mistake")


def test_bytes_that_are_no_text_are_shown():
    assert json.loads(JsonFormatter().format(record("%s", os.fsdecode(b"/tmp/\xff"))))["message"] == "/tmp/\\udcff"


# -- the thread that writes --------------------------------------------------------------------------------------------


class Stuck(io.StringIO):
    """A stream that nobody reads, until told."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.open = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.open.wait(60)
        return super().write(text)


def test_nobody_waits_for_a_reader_and_what_finds_no_room_is_counted():
    stream = Stuck()
    handler = AsideHandler(stream, room=3)
    handler.emit(record("first"))
    assert stream.entered.wait(60)
    began = time.monotonic()
    for number in range(10):
        handler.emit(record("%d", number))
    assert time.monotonic() - began < 2
    stream.open.set()
    handler.close()
    assert stream.getvalue().splitlines() == ["first", "0", "7 lines were dropped: nobody read", "1", "2"]


def test_a_stream_that_fails_costs_its_line_alone():
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            if "lost" in text:
                raise BrokenPipeError
            return super().write(text)

    stream = Broken()
    handler = AsideHandler(stream)
    for text in ("lost", "kept"):
        handler.emit(record(text))
    handler.close()
    assert stream.getvalue() == "kept\n"


def test_a_wrong_log_call_is_reported_and_ends_nothing(capsys: pytest.CaptureFixture[str]):
    stream = io.StringIO()
    handler = AsideHandler(stream)
    handler.emit(record("%d", "no number"))
    handler.emit(record("next"))
    handler.close()
    assert stream.getvalue() == "next\n"
    assert "Logging error" in capsys.readouterr().err


# -- etha agent --------------------------------------------------------------------------------------------------------


def test_a_healthy_agent_says_nothing_by_default(agent, owner, reader):
    reader.do("lease = policy.read(); lease.release()")
    owner.do("with policy.update(): pass")
    owner.do("client.register_tensors('other', {'w': weights}).close()")
    assert agent.stop() == 0
    assert agent.errors.read_text() == ""


def test_info_as_text(start_agent):
    agent = start_agent("--log-level", "INFO")
    agent.stop()
    (first, last) = agent.errors.read_text().splitlines()
    assert first.startswith("etha agent: ")
    assert "INFO: rank 0 serves cpu at " in first
    assert last.endswith("INFO: rank 0 has ended")


def test_a_refusal_to_start_is_a_line_too(agent):
    done = subprocess.run([*AGENT, "--log-json"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = map(json.loads, done.stderr.splitlines())
    assert (said["level"], said["logger"]) == ("ERROR", "etha.cli.agent")
    assert f"AgentRunning: pid {agent.pid} " in said["message"]


def test_an_unknown_level_is_refused(runtime):
    done = subprocess.run([*AGENT, "--log-level", "loud"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "warning" in done.stderr


def test_what_ends_the_agent_is_a_line_too(runtime):
    code = (
        "import sys\n"
        "from etha.cli.logs import Level, configure\n"
        "configure(Level.WARNING, json=True)\n"
        "raise RuntimeError('a mistake')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    (said,) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, said["level"]) == (1, "CRITICAL")
    assert "RuntimeError: a mistake" in said["exception"]


def test_an_agent_whose_log_nobody_reads_goes_on_serving(runtime, start_worker):
    """Its stderr is a pipe that is full and never read."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    agent = subprocess.Popen([*AGENT, "--log-level", "info"], stdout=subprocess.PIPE, stderr=write, text=True)
    try:
        assert "serves" in agent.stdout.readline()
        worker = start_worker()
        worker.do("p = client.register_tensors('w', {'w': torch.ones(4).share_memory_()}); p.close()")
        assert worker.end() == 0
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 0
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
        os.close(read)
        os.close(write)

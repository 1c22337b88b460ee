"""Calls of a ring on a GPU come one after another, on whatever streams they are made."""

import pytest
import torch
from ringkern.turns import Turns

GPU = torch.device("cuda", 1)


class Stream:
    """A stream that writes down what was put on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.recorded}")


class Event:
    def record(self, stream):
        self.recorded = f"the call on {stream.name}"


@pytest.fixture
def streams(monkeypatch):
    """Return (log, use): use(name) makes a stream the current one."""
    log, current, known = [], [], {}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])

    def use(name):
        current.append(known.setdefault(name, Stream(name, log)))

    return log, use


def test_a_call_comes_after_the_one_on_another_stream(streams):
    log, use = streams
    turns = Turns(GPU)
    for name in ("a", "a", "b", "b", "a"):
        use(name)
        with turns:
            log.append(f"call on {name}")
    assert log == [
        "call on a",
        "call on a",
        "b waits for the call on a",
        "call on b",
        "call on b",
        "a waits for the call on b",
        "call on a",
    ]


def test_a_call_that_failed_is_waited_for_too(streams):
    log, use = streams
    turns = Turns(GPU)
    use("a")
    with pytest.raises(KeyError), turns:
        raise KeyError
    use("b")
    with turns:
        pass
    assert log == ["b waits for the call on a"]


def test_a_cpu_has_no_streams():
    with Turns(torch.device("cpu")):
        pass

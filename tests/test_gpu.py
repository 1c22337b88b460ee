"""Which GPU a rank takes, and whether ranks can use NCCL: decided from what all ranks say."""

import types

import pytest
import torch
from ringkern import gpu
from ringkern.errors import ArgumentError, UnsupportedError


def pretend(monkeypatch, count, current=0, local=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("RINGKERN_DEVICE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local))


@pytest.mark.parametrize(
    ("count", "current", "local", "asked", "transport", "want"),
    [
        (0, 0, None, None, "auto", "cpu"),
        (8, 0, None, None, "auto", "cuda:0"),
        (8, 0, 3, None, "auto", "cuda:3"),
        (8, 5, 3, None, "auto", "cuda:5"),  # set_device() was called
        (1, 0, 3, None, "auto", "cuda:0"),  # CUDA_VISIBLE_DEVICES shows but one
        (8, 0, 3, "cuda", "nccl", "cuda:3"),
        (8, 0, 3, "cuda:6", "tcp", "cuda:6"),
        (8, 0, 3, "cpu", "auto", "cpu"),
        (8, 0, 3, None, "local", "cpu"),
    ],
)
def test_device_of_a_rank(monkeypatch, count, current, local, asked, transport, want):
    pretend(monkeypatch, count, current, local)
    assert gpu.pick_device(asked, transport) == torch.device(want)


def test_the_variable_names_the_device_of_rings_that_name_none(monkeypatch):
    pretend(monkeypatch, 4)
    monkeypatch.setenv("RINGKERN_DEVICE", "cpu")
    assert gpu.pick_device(None, "auto") == torch.device("cpu")
    assert gpu.pick_device("cuda:2", "auto") == torch.device("cuda:2")
    monkeypatch.setenv("RINGKERN_DEVICE", "cuda:9")
    with pytest.raises(ArgumentError, match="from 0 to 3, got cuda:9"):
        gpu.pick_device(None, "auto")


def test_devices_that_cannot_be(monkeypatch):
    pretend(monkeypatch, 0)
    with pytest.raises(UnsupportedError, match="torch.*finds none here.*doctor"):
        gpu.pick_device("cuda", "auto")
    pretend(monkeypatch, 2)
    with pytest.raises(ArgumentError, match="from 0 to 1, got cuda:2"):
        gpu.pick_device("cuda:2", "auto")
    with pytest.raises(UnsupportedError, match='"cpu" or "cuda", got \'meta\''):
        gpu.pick_device("meta", "auto")
    with pytest.raises(ArgumentError, match="want a torch device, got 'gpu'"):
        gpu.pick_device("gpu", "auto")


def fact(uuid, host="a", nccl=22809, shares=False, hostid=None, no_nccl=""):
    return dict(gpu=uuid, host=host, nccl=nccl, shares=shares, hostid=hostid, no_nccl=no_nccl)


def test_ranks_with_a_gpu_each_take_nccl():
    facts = [fact("x"), fact("y"), fact("z", host="b")]
    assert gpu.takes_nccl("auto", facts)
    assert gpu.takes_nccl("nccl", facts)
    assert not gpu.takes_nccl("tcp", facts)


def test_a_gpu_that_two_ranks_claim():
    shared = [fact("x"), fact("y"), fact("x")]
    for asked in ("auto", "nccl"):
        with pytest.raises(ArgumentError, match=r"x on ranks \[0, 2\].*set_device.*tcp"):
            gpu.takes_nccl(asked, shared)
    assert not gpu.takes_nccl("tcp", shared)
    # In two containers of a host, which have names of their own.
    with pytest.raises(ArgumentError, match=r"x on ranks \[0, 1\]"):
        gpu.takes_nccl("auto", [fact("x"), fact("x", host="b")])
    # Nobody has asked for TCP, on which they would take turns.
    with pytest.raises(ArgumentError, match=r"x on ranks \[0, 1\]"):
        gpu.takes_nccl("auto", [fact("x"), fact("x", nccl=0, no_nccl="libnccl.so.2: not found.")])
    # NCCL can be told to: from 2.30 on by a variable, before by taking the ranks for other hosts.
    assert gpu.takes_nccl("nccl", [fact("x", nccl=23000, shares=True)] * 2)
    assert gpu.takes_nccl("nccl", [fact("x", hostid=name) for name in "12"])
    with pytest.raises(ArgumentError, match="x on ranks"):
        gpu.takes_nccl("nccl", [fact("x", nccl=22907, shares=True)] * 2)
    with pytest.raises(ArgumentError, match="x on ranks"):
        gpu.takes_nccl("nccl", [fact("x", hostid="1")] * 2)


def test_a_rank_without_nccl():
    facts = [fact("x"), fact("y", nccl=0, no_nccl="libnccl.so.2: not found.")]
    with pytest.raises(UnsupportedError, match="rank 1: libnccl.so.2: not found.*tcp"):
        gpu.takes_nccl("nccl", facts)
    with pytest.warns(RuntimeWarning, match="over TCP, which is slower.*rank 1: libnccl"):
        assert not gpu.takes_nccl("auto", facts)


def test_versions_of_nccl_that_differ():
    with pytest.raises(ArgumentError, match=r"22809: ranks \[0\]; 23007: ranks \[1\]"):
        gpu.takes_nccl("auto", [fact("x"), fact("y", nccl=23007)])


def test_the_wheel_for_this_cuda_is_taken(monkeypatch, tmp_path):
    def dist(name):
        path = tmp_path / name
        return types.SimpleNamespace(metadata={"Name": name}, locate_file=lambda _: path)

    wheels = [dist("nvidia-nccl-cu12"), dist("numpy"), dist("nvidia-nccl-cu13")]
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda: wheels)
    monkeypatch.delenv("RINGKERN_NCCL_PATH", raising=False)
    for cuda, want in (("13.0", "cu13"), ("12.8", "cu12"), (None, "cu12")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert gpu.nccl_path().endswith(want)
    monkeypatch.setenv("RINGKERN_NCCL_PATH", "mine.so")
    assert gpu.nccl_path() == "mine.so"
    monkeypatch.delenv("RINGKERN_NCCL_PATH")
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda: [])
    assert gpu.nccl_path() == ""


def test_options_of_nccl(monkeypatch):
    assert gpu.nccl_options(60.0) == dict(
        timeout_s=30.0, min_ctas=0, max_ctas=0, channels_per_net_peer=0
    )
    monkeypatch.setenv("RINGKERN_NCCL_MAX_CTAS", "8")
    assert gpu.nccl_options(60.0)["max_ctas"] == 8
    monkeypatch.setenv("RINGKERN_NCCL_CHANNELS", "65")
    with pytest.raises(ArgumentError, match="RINGKERN_NCCL_CHANNELS: want 0 to 64, got '65'"):
        gpu.nccl_options(60.0)

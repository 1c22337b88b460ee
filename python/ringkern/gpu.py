"""A rank's GPU: which one it is, who else claims it, and which NCCL serves it."""

import importlib.metadata
import os
import warnings

import torch

from ringkern import env
from ringkern.errors import ArgumentError, RingkernError, UnsupportedError, check
from ringkern.join import check_alike
from ringkern.topology import Place, shared_gpus

MANY_RANKS_NCCL = 23000  # the first that can be told to serve several ranks on one GPU


def pick_device(device, transport: str) -> torch.device:
    """Return the device that init_ring()'s argument names.

    None: RINGKERN_DEVICE, else the GPU that torch.cuda.set_device() chose, or GPU number LOCAL_RANK
    where it chose none; the CPU where there is no CUDA, and for a "local" ring.

    Raises:
        ArgumentError: it is no device, or there is no such GPU.
        UnsupportedError: it is neither the CPU nor a GPU, or torch finds no CUDA here.
    """
    if device is None:
        usable = transport != "local" and torch.cuda.is_available()
        device = os.environ.get("RINGKERN_DEVICE") or ("cuda" if usable else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device: want a torch device, got {device!r}: {error}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UnsupportedError(f'device: want "cpu" or "cuda", got {device.type!r}.')
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device: want CUDA for {str(device)!r}, but torch {torch.__version__} finds none here. "
            'Use device="cpu", or run `ringkern doctor`.'
        )
    count = torch.cuda.device_count()
    index = _own_index(count) if device.index is None else device.index
    check(index < count, "device", f"a GPU from 0 to {count - 1}", str(device))
    return torch.device("cuda", index)


def _own_index(count: int) -> int:
    """Return the GPU of a process that named none."""
    chosen = torch.cuda.current_device()
    local = os.environ.get("LOCAL_RANK", "0")
    # 0 is what a process that chose none has, and LOCAL_RANK counts the GPUs of the host: where
    # this process sees but its own, that is number 0.
    return int(local) if chosen == 0 and local.isdigit() and int(local) < count else chosen


def nccl_path() -> str:
    """Return the NCCL to load where the process has none: RINGKERN_NCCL_PATH, else the wheel's.

    Of several wheels, the one for the CUDA that torch was built for. Empty if there is none.
    """
    given = os.environ.get("RINGKERN_NCCL_PATH")
    if given:
        return given
    wheels = {}
    for dist in importlib.metadata.distributions():
        name = (dist.metadata["Name"] or "").lower()
        if name.startswith("nvidia-nccl"):
            wheels[name] = str(dist.locate_file("nvidia/nccl/lib/libnccl.so.2"))
    major = (torch.version.cuda or "").partition(".")[0]
    return wheels.get(f"nvidia-nccl-cu{major}") or next(iter(wheels.values()), "")


def describe(device: torch.device) -> dict:
    """Return what the other ranks need to know of NCCL on this rank."""
    if device.type == "cpu":
        return {}
    from ringkern import _C

    shares = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    found = {"shares": shares, "hostid": os.environ.get("NCCL_HOSTID"), "nccl": 0, "no_nccl": ""}
    try:
        found["nccl"] = _C.nccl_library(nccl_path())[1]
    except RingkernError as error:
        found["no_nccl"] = str(error)[:300]
    return found


def takes_nccl(asked: str, every: list[dict]) -> bool:
    """Return whether ranks on GPUs use NCCL, the same on every rank; if not, TCP.

    Args:
        asked: "auto", "nccl" or "tcp", as all ranks did.
        every: what describe() returned on each rank, with "host" and "gpu", which tell these apart.

    Raises on every rank alike:
        ArgumentError: ranks claim the same GPU, or have different versions of NCCL.
        UnsupportedError: NCCL was asked for, and a rank has none that will do.
    """
    if asked == "tcp":
        return False
    _check_shared(every)
    without = [(rank, fact["no_nccl"]) for rank, fact in enumerate(every) if fact["no_nccl"]]
    if without:
        rank, reason = without[0]
        told = f"rank {rank}: {reason}"
        if asked == "nccl":
            raise UnsupportedError(f'transport "nccl": {told} Use transport="tcp".')
        warnings.warn(
            f"the ring moves GPU memory over TCP, which is slower, as NCCL cannot: {told}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    check_alike("NCCL's version", [fact["nccl"] for fact in every])
    return True


def _check_shared(every: list[dict]) -> None:
    """Raise if ranks claim one GPU, which NCCL does not serve unless it was told to.

    Also where TCP is to take its place, which does: a ring that nobody asked to share is slow by
    mistake.
    """
    for ranks in shared_gpus([Place.from_record(fact) for fact in every]):
        told = [every[rank] for rank in ranks]
        shares = all(fact["shares"] and fact["nccl"] >= MANY_RANKS_NCCL for fact in told)
        apart = len({fact["hostid"] for fact in told}) == len(ranks)
        check(
            shares or apart,
            "device",
            "a GPU of its own for each rank",
            f"{told[0]['gpu']} on ranks {ranks}",
            "Call torch.cuda.set_device(LOCAL_RANK) before init_ring(), or give device=; ranks "
            'that are to share a GPU can use transport="tcp".',
        )


def nccl_options(timeout_s: float) -> dict:
    """Return what _C.join_nccl() takes of the environment and of init_ring()'s timeout_s.

    An exchange may take half of timeout_s. The other half is for finding out who is late.
    """
    return {
        "timeout_s": timeout_s / 2,
        "min_ctas": env.whole("RINGKERN_NCCL_MIN_CTAS", 64),
        "max_ctas": env.whole("RINGKERN_NCCL_MAX_CTAS", 64),
        "channels_per_net_peer": env.whole("RINGKERN_NCCL_CHANNELS", 64),
    }

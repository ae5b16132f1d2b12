"""What a device is, asked of torch in one place. Whatever depends on it takes a `DeviceProfile`, so that a laptop can plan for an H100."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """Attributes:
    kind: torch's name of the type, "cuda" or "cpu". name: the product's, '' of a CPU.
    capability: (major, minor) of a GPU's compute capability; (0, 0) of a CPU.
    memory: bytes, 0 of a CPU, whose memory is the host's. multiprocessors: 0 of a CPU.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    multiprocessors: int = 0

    @property
    def architecture(self) -> str:
        return "sm_" + "".join(map(str, self.capability))


CPU = DeviceProfile("cpu")
H100 = DeviceProfile("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 132)
"""As torch reports it."""


@functools.cache
def profile_of(device: torch.device | str) -> DeviceProfile:
    """The profile of a device. A GPU that is only pretended (tensors of FakeTensorMode on a machine without one) is an H100."""
    device = torch.device(device)
    if device.type != "cuda":
        return DeviceProfile(device.type)
    if not torch.cuda.is_available():
        return H100
    found = torch.cuda.get_device_properties(device)
    return DeviceProfile(
        "cuda", found.name, (found.major, found.minor), found.total_memory, found.multi_processor_count
    )

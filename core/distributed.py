"""Several processes that train one network, as `torchrun` starts them; a single one needs none of this."""

import signal

import torch
import torch.distributed as dist

from utils import process_count, process_index, select_device


def start_processes(gpu, amp="off"):
    """Join the other processes if `torchrun` started this process -> `select_device`'s torch.device."""
    device = select_device(gpu, amp)
    if dist.is_torchelastic_launched():
        cuda = device.type == "cuda"
        # It waits for the others outside Python, and so would Python's handlers: a signal ends the process at once.
        handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return device


def leave_processes():
    """Part from the other processes. Delete `DistributedDataParallel` models first: if one is the last owner of the
    process group, its destructor deadlocks."""
    wait_for_processes()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_processes():
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def min_over_processes(tensor):
    """The smallest value of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def broadcast_buffers(net):
    """Give all processes the first one's running statistics, so that they test the network that is saved."""
    for buffer in net.buffers() if dist.is_initialized() else []:
        dist.broadcast(buffer, 0)


def generator_states(device):
    """States of PyTorch's generators, of the CPU and of the device, in each process: what augmentation draws from."""
    own = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    states = [own]
    if process_count() > 1:
        states = [None] * process_count()
        dist.all_gather_object(states, own)
    return states


def set_generators(states, device):
    """Go on drawing where `generator_states` were read."""
    cpu, *cuda = states[process_index()]
    torch.set_rng_state(cpu)
    for state in cuda if device.type == "cuda" else []:
        torch.cuda.set_rng_state(state, device)


class _Gather(torch.autograd.Function):
    """Every process uses the rows of all processes: a row's gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(tensor):
    """Rows of all processes, in the order of the processes, with gradient: [N, ...] -> [processes x N, ...]."""
    return _Gather.apply(tensor.contiguous()) if process_count() > 1 else tensor

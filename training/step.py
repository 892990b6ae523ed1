"""Augmentation, forward pass, losses and backward pass of one batch."""

import torch

from utils import autocast

WARM_UP = 3  # steps before a step is recorded, as PyTorch's documentation asks for


class TrainStep:
    """step(visible, infrared, labels) -> (losses, output, labels); the gradients are in the parameters.

    visible, infrared: uint8 on `device`. augment: they and their labels -> the two inputs of `net`, and their labels;
    criterion(output, labels) -> a named tuple of scalar tensors whose `total` is minimised.
    """

    def __init__(self, net, criterion, augment, device, amp="off"):
        self.net, self.criterion, self.augment, self.device, self.amp = net, criterion, augment, device, amp

    def __call__(self, *batch):
        self.net.zero_grad()
        return self._compute(*batch)

    def _compute(self, *batch):
        visible, infrared, labels = self.augment(*batch)
        with autocast(self.device, self.amp):
            output = self.net(visible, infrared)
        losses = self.criterion(output, labels)
        losses.total.backward()
        return losses, output, labels


class GraphedStep(TrainStep):
    """The same, recorded at the first call as a CUDA graph, which later calls replay.

    A step has thousands of short tasks. The GPU waits while the CPU starts them one by one; it starts a graph at once.
    All batches need one shape. What a call returns, and the gradients, stay valid until the next one. Python runs only
    while the step is recorded: a loss or augmentation whose Python code decides anything anew in each step, or reads a
    tensor's value, needs `--graph 0`.
    """

    graph = None

    def __call__(self, *batch):
        if self.graph is None:
            self._record(batch)
        for recorded, values in zip(self.batch, batch, strict=True):
            recorded.copy_(values)
        self.graph.replay()
        for parameter, gradient in self.gradients:  # somebody may have taken them off since
            parameter.grad = gradient
        return self.result

    def _record(self, batch):
        self.batch = [values.clone() for values in batch]
        # Recording must not train: statistics, DNS's followers and random numbers are afterwards as they were before.
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        random = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                super().__call__(*self.batch)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.net.zero_grad()  # so that the graph makes gradients of its own, which it fills anew each time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loading threads may use CUDA meanwhile
            self.result = self._compute(*self.batch)
        self.net.load_state_dict(state)
        torch.cuda.set_rng_state(random, self.device)
        self.gradients = [(parameter, parameter.grad) for parameter in self.net.parameters()]
        self.graph = graph

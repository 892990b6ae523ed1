"""What each `--method` costs: parameters, a training step, and an image in a test."""

import torch

import train_ext_test0
from ChannelAug import normalise
from methods import METHODS
from testing import engine
from tools.benchmarks.measuring import alternate
from tools.benchmarks.step import PEOPLE
from training.engine import train_epoch
from training.optim import build_optimizer
from utils import seed_everything


def bench_methods(args, device):
    """Steps have the batch of the method's own recipe for SYSU-MM01, at one size of images for all."""
    print(f"{'':10}{'parameters, M':>15}{'images a step':>15}{'a step, ms':>12}{'a test image, ms':>18}")
    # One after the other: the memory of a recorded step serves no other network.
    return {method: bench_method(method, args, device) for method in METHODS}


def bench_method(method, args, device):
    """Training steps of a method, and a test of its network, on random images."""
    names = ("arch", "img_h", "img_w", "amp", "graph")
    argv = [f"--{name}={getattr(args, name)}" for name in names]
    recipe = train_ext_test0.get_args_parser().parse_args([*argv, f"--method={method}", "--weights=none"])
    seed_everything(0)
    net = train_ext_test0.build_network(recipe, PEOPLE, device, pretrained=True)
    step = train_ext_test0.build_step(recipe, net, device)
    optimizer = build_optimizer(net, recipe.optim, 1e-6, METHODS[method].rates)
    labels = torch.arange(recipe.batch_size, device=device).repeat_interleave(recipe.num_pos)
    images = torch.randint(256, (len(labels), 3, args.img_h, args.img_w), dtype=torch.uint8, device=device)
    batch = images, images.flip(0), labels
    count, parameters = len(step.augment(*batch)[2]), sum(p.numel() for p in net.parameters())

    def train():
        train_epoch(step, optimizer, [batch] * args.steps)

    def test():
        """Embed the visible images of a batch, each with its mirror image."""
        with torch.inference_mode():
            engine.network_embedding(net, device, normalise, args.amp)(images, "visible")

    (turn,), (test_turn,) = (alternate(method, [side], args.repeats, device) for side in (train, test))
    seconds, image = turn / args.steps, test_turn / len(images)
    print(f"{method:10}{parameters / 1e6:15.1f}{count:15}{1000 * seconds:12.0f}{1000 * image:18.1f}")
    return {"parameters": parameters, "images_per_step": count, "step_seconds": seconds, "image_seconds": image}

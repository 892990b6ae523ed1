"""What each `--method` costs: parameters, a training step, and an image in a test."""

import torch

from ChannelAug import normalise
from methods import METHODS
from testing import engine
from tools.benchmarks.measuring import alternate
from tools.benchmarks.step import PEOPLE, build_training
from training.engine import train_epoch


def bench_methods(args, device):
    """Parameters of each --method, a step with its own recipe's batch, and its test, on random images of one size."""
    print(f"{'':10}{'parameters, M':>15}{'images a step':>15}{'a step, ms':>12}{'a test image, ms':>18}")
    # One after the other: the memory of a recorded step serves no other network.
    return {method: bench_method(method, args, device) for method in METHODS}


def bench_method(method, args, device):
    """Training steps of a method, and a test of its network, on random images."""
    recipe, step, optimizer = build_training(args, PEOPLE, device, f"--method={method}")
    labels = torch.arange(recipe.batch_size, device=device).repeat_interleave(recipe.num_pos)
    images = torch.randint(256, (len(labels), 3, args.img_h, args.img_w), dtype=torch.uint8, device=device)
    batch = images, images.flip(0), labels
    count, parameters = len(step.augment(*batch)[2]), sum(p.numel() for p in step.net.parameters())

    def train():
        train_epoch(step, optimizer, [batch] * args.steps)

    def test():  # each image with its mirror image
        with torch.inference_mode():
            engine.network_embedding(step.net, device, normalise, args.amp)(images, "visible")

    (turn,), (test_turn,) = (alternate([side], args.repeats, device) for side in (train, test))
    seconds, image = turn / args.steps, test_turn / len(images)
    print(f"{method:10}{parameters / 1e6:15.1f}{count:15}{1000 * seconds:12.0f}{1000 * image:18.1f}")
    return {"parameters": parameters, "images_per_step": count, "step_seconds": seconds, "image_seconds": image}

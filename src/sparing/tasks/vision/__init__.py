"""Image classification on Fashion-MNIST and CIFAR-10."""

from sparing.tasks.vision.options import VisionOptions
from sparing.tasks.vision.vision import Vision

__all__ = ["Vision", "VisionOptions"]

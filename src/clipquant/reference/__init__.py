"""The reference network and the data it is trained on."""

from clipquant.reference.fashion_mnist import FashionMNIST
from clipquant.reference.mnist import MNIST5k
from clipquant.reference.random_digit import RandomDigit
from clipquant.reference.two_conv import TwoConvNet

__all__ = ["FashionMNIST", "MNIST5k", "RandomDigit", "TwoConvNet"]

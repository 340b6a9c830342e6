"""Take an ImageNet ResNet, give it a new head, fine-tune it on your pictures, in JAX."""

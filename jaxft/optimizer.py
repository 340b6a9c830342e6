"""SGD with momentum in torch's convention, and learning rate schedules."""

import optax
from ml_collections import ConfigDict


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then constant, or a half cosine to 0 at the end."""
    warmup_steps = int(config.warmup_epochs * steps_per_epoch)
    decay_steps = max(num_epochs * steps_per_epoch - warmup_steps, 1)
    schedule = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
    }[config.schedule]
    if not warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])


def make_optimizer(config: ConfigDict, steps_per_epoch: int, num_epochs: int) -> optax.GradientTransformation:
    """torch.optim.SGD: g += weight_decay * p; m = momentum * m + g; p -= learning_rate * m.

    With Nesterov, p -= learning_rate * (g + momentum * m).
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.sgd(
            learning_rate_schedule(config, steps_per_epoch, num_epochs),
            momentum=config.momentum or None,
            nesterov=config.nesterov,
        ),
    )

"""Two ordinary trainings with LearnedOptimizer beside a tuned AdamW: a ResNet and a small transformer."""

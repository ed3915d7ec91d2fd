"""What `make train` runs on: sample data that ships with the package, and where the sample model lies."""

from trietune.demo.locations import (
    DEMO_MODEL,
    DEMO_PREFERENCES,
    DEMO_QUESTIONS,
    DEMO_REVIEWS,
    demo_config,
    demo_preferences,
    demo_questions,
    demo_reviews,
    installed_smollm2,
    smollm2_gguf,
)

__all__ = [
    "DEMO_MODEL",
    "DEMO_PREFERENCES",
    "DEMO_QUESTIONS",
    "DEMO_REVIEWS",
    "demo_config",
    "demo_preferences",
    "demo_questions",
    "demo_reviews",
    "installed_smollm2",
    "smollm2_gguf",
]

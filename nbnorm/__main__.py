"""``python -m nbnorm`` prints the configuration."""

from nbnorm.config import show_config

show_config()

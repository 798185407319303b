"""Talks to a trained model: in the terminal, and on a page that shows what the picture did."""

from dpa_xtuner.chat.models import ChatModel, Turn, open_chat

__all__ = ["ChatModel", "Turn", "open_chat"]

"""Conversations through a chat template, in a process of their own: a template is a program from elsewhere."""

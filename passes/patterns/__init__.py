"""Nouns: what attention over a cache looks like in a dynamo graph. Everything here reads; nothing edits."""

"""Transcripts and flat exports, from rows alone."""

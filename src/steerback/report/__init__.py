"""What people read: tables and transcripts, from rows and estimates alone."""

"""One library function per command."""

"""The two processes of each contestant; standard library only in this file."""

"""The same random script into two backends; every answer and every ring entry must be equal after every step."""

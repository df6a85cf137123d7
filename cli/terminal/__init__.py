"""What a chat shows on a terminal and reads from it: lines, Markdown, completion, commands."""

"""Tables for the terminal and Markdown, and plots of what the gates learned."""

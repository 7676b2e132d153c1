"""What the page shows of each kind of run: from the files that a command left to what a template needs.

Each part is a mapping; ``template`` names the file in ``reporting/templates`` that shows it.
"""

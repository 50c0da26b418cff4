"""Reports: terminal tables, Markdown, and one self-contained HTML page with plots.

Import the modules directly; this file imports nothing.
"""

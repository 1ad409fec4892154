"""The report of a study: tables, curves and plain sentences, as one HTML file and as Markdown with images."""

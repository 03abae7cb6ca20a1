"""Shows a web page on which regions are painted and captioned."""

"""What is on a page of a PDF, read without a library: its width and the sizes of its fonts."""

import re
import zlib


def page_width(pdf):
    """Width of a PDF's page in points."""
    box = re.search(rb"/MediaBox \[ *([\d. ]+?) *\]", pdf.read_bytes()).group(1).split()
    return float(box[2]) - float(box[0])


def printed_sizes(pdf):
    """Sizes in points of all text in a PDF, as the page's own drawing commands name them."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL)
    pages = [zlib.decompressobj().decompress(stream) for stream in streams if stream[:1] == b"x"]
    return [float(size) for page in pages for size in re.findall(rb"/F\S+ ([\d.]+) Tf", page)]

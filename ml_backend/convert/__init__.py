"""Between Label Studio's regions and SAM's prompts and masks; knows neither torch nor Flask.

Regions measure in percent of the image as it is shown, that is, after EXIF rotation; prompts and
masks in its pixels. A pixel in row i and column j covers the square from (j, i) to (j + 1, i + 1).
"""

"""A report's charts as SVG: text stays text, and every colour is a CSS variable of the page that they stand in."""

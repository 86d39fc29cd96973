"""The report as one HTML page: no script, no font, no picture from elsewhere."""

import base64

from jinja2 import Environment

from hf_paged_evals.report import plot_names
from hf_paged_evals.report.text import FIGURE_COLUMNS, TITLE, duration, facts, figure_rows, number, numeric_columns

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 76rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #bbb; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #555; }
td { white-space: nowrap; }
td.number, th.number { text-align: right; }
td.long { white-space: normal; min-width: 18rem; }
.facts td + td { white-space: normal; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 1rem; }
.plots figure { margin: 1rem 0 0; }
.plots img { width: 100%; max-width: 40rem; height: auto; display: block; }
.small { color: #555; font-size: .85rem; max-width: 60rem; }
.flag { border-left: .3rem solid #b00020; padding-left: .6rem; font-weight: 600; }
p, h1 + ul { max-width: 60rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{%- macro table(columns, rows, numeric, kind="") %}
<div class="wide"><table class="{{ kind }}">
<thead><tr>
{%- for column in columns %}<th{% if loop.index0 in numeric %} class="number"{% endif %}>{{ column }}</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for row in rows %}
<tr>{% for cell in row %}<td{% if loop.index0 in numeric %} class="number"
{%- elif cell | string | length > 60 %} class="long"{% endif %}>{{ cell | number }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
{%- macro flags(section) %}
{%- for flag in section.flags %}
<p class="flag">Wrong: {{ flag }}</p>
{%- endfor %}
{%- endmacro %}
<h1>{{ title }}</h1>
<ul>
{%- for section in sections %}
<li><a href="#{{ section.anchor }}">{{ section.title }}</a>. {{ section.summary }}{{ flags(section) }}</li>
{%- endfor %}
</ul>
{%- for section in sections %}
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
<p>{{ section.summary }}</p>
{{- flags(section) }}
{%- if section.figures %}{{ table(figure_columns, section.figures, [1, 3]) }}{% endif %}
{%- if section.pictures %}
<div class="plots">
{%- for picture in section.pictures %}
<figure><img src="data:image/svg+xml;base64,{{ picture.data }}" alt="{{ picture.text }}"></figure>
{%- endfor %}
</div>
{%- endif %}
{%- for one in section.tables %}
<h3>{{ one.title }}</h3>
{{ table(one.columns, one.rows, one.numeric) }}
{%- if one.note %}<p class="small">{{ one.note }}</p>{% endif %}
{%- endfor %}
{%- if section.notes %}
<ul class="small">{% for note in section.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{%- endif %}
<p class="small">Took {{ section.took }}.</p>
{%- endfor %}
<h2 id="run">The run</h2>
{{ table(["What", "Value"], facts, [], "facts") }}
</body>
</html>
"""


def render(results: dict, drawn: dict[str, str], title: str = TITLE) -> str:
    """The page.

    Parameters
    ----------
    results : dict
        What results.json holds.
    drawn : dict of str to str
        SVG of each plot, by `plot_names.name`.
    title : str
    """
    environment = Environment(autoescape=True)
    environment.filters["number"] = number
    sections = [_section(section, index, drawn) for index, section in enumerate(results["sections"])]
    return environment.from_string(_PAGE).render(
        title=title,
        style=_STYLE,
        sections=sections,
        facts=list(facts(results)),
        figure_columns=FIGURE_COLUMNS,
    )


def _section(section: dict, index: int, drawn: dict[str, str]) -> dict:
    pictures = []
    for place, plot in enumerate(section["plots"]):
        svg = drawn[plot_names.name(section, index, place)]
        data = base64.b64encode(svg.encode()).decode()
        pictures.append({"data": data, "text": plot_names.description(plot)})
    return {
        "anchor": f"s{index}",
        "title": section["title"],
        "summary": section["summary"],
        "flags": section["flags"],
        "figures": figure_rows(section),
        "pictures": pictures,
        "tables": [{**one, "numeric": numeric_columns(one["columns"], one["rows"])} for one in section["tables"]],
        "notes": section["notes"],
        "took": duration(section["seconds"]),
    }

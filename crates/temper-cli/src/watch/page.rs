//! The page, which its script fills, and the form that asks for the token.

use crate::report::html::{Script, section, served};
use crate::report::page::{Figure, charts, frame};
use crate::report::plots::{PLOTS, Plot};

const SCRIPT: &str = concat!(
    include_str!("../report/chart.js"),
    include_str!("../report/curves.js"),
    include_str!("watch.js")
);

/// The page without runs, and its policy.
pub fn page<'a>(verbs: impl Iterator<Item = &'a str> + Clone) -> (String, String) {
    let figure = |plot: &'static Plot| Figure {
        plot,
        unit: plot.unit(verbs.clone()),
        drawn: (0..plot.lines.len()).collect(),
    };
    let figures: Vec<Figure> = PLOTS.iter().map(figure).collect();
    let body = [
        "<p class=\"key\" id=\"state\" role=\"status\">asking for the runs</p>\n".to_owned(),
        section("Runs", RUNS),
        section("Curves", &charts(&figures)),
        section("Differing settings", "<div class=\"scroll left\" id=\"differences\"></div>\n"),
        format!("<div id=\"about\" hidden>\n{}</div>\n", ABOUT),
    ];
    let data = frame(PLOTS.iter().map(|plot| (plot, plot.lines.iter().collect())));
    served("temper watch", &body.concat(), Some(Script { code: SCRIPT, data: &data }))
}

const RUNS: &str = "<div class=\"scroll wide\"><table class=\"runs\">\n<thead><tr><th>run</th><th>state</th>\
    <th>steps</th><th>time left</th><th>loss</th><th>eval loss</th><th>accuracy</th><th>tokens/s</th><th></th></tr>\
    </thead>\n<tbody id=\"runs\"></tbody>\n</table></div>\n<p class=\"key\" id=\"none\" hidden>There is no run here \
    yet. It appears by itself when one begins.</p>\n\
    <p class=\"key\">Loss and tokens/s are the last step's; accuracy is the last evaluation's, or without one the last \
    step's.</p>\n";

const ABOUT: &str = "<section>\n<h2 id=\"about-name\"></h2>\n<p class=\"key\" id=\"about-folder\"></p>\n\
    <ul class=\"notes\" id=\"about-notes\"></ul>\n<div id=\"answers\"></div>\n\
    <details open>\n<summary>the end of <span id=\"said\"></span></summary>\n<pre class=\"log\" id=\"log\"></pre>\n\
    </details>\n<details>\n<summary>all settings</summary>\n\
    <div class=\"scroll left\" id=\"settings\"></div>\n</details>\n</section>\n";

/// The form, with what was wrong before.
pub fn login(wrong: &str) -> (String, String) {
    let body = format!(
        "<form method=\"post\" action=\"/login\" class=\"login\">\n<label for=\"token\">The token that \
         <code>temper watch</code> printed where it was started:</label>\n<input id=\"token\" name=\"token\" \
         type=\"password\" autocomplete=\"off\" required autofocus>\n<button>Open</button>\n\
         <p role=\"alert\">{wrong}</p>\n</form>\n"
    );
    served("temper watch", &body, None)
}

//! The rows that several systems share, as bars in SVG. A bar is the median, its whisker the range.

use std::fmt::Write;

use crate::report::{Row, SYSTEMS, figure};

const WIDTH: f64 = 960.0;
/// Left end of the bars, and the longest value.
const LEFT: f64 = 440.0;
const LONGEST: f64 = 400.0;
const BAR: f64 = 13.0;
const GAP: f64 = 12.0;
const TOP: f64 = 80.0;
const COLOURS: [&str; 4] = ["#1b6ca8", "#8a8a8a", "#e0a030", "#3f8f5f"];

/// The plot.
pub fn svg(rows: &[Row], caption: &str) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for row in rows {
        let shared: Vec<_> = SYSTEMS
            .iter()
            .filter_map(|of| Some((*of, row.summary(*of)?)))
            .collect();
        if shared.len() < 2 {
            continue;
        }
        let most = shared
            .iter()
            .map(|(_, short)| short.most)
            .fold(f64::MIN_POSITIVE, f64::max);
        let middle = y + BAR * shared.len() as f64 / 2.0 + 4.0;
        let label = escaped(&format!("{}: {} ({})", row.group, row.name, row.unit));
        let _ = writeln!(
            body,
            r#"<text x="{:.1}" y="{middle:.1}" text-anchor="end">{label}</text>"#,
            LEFT - 10.0
        );
        for (of, short) in shared {
            let long = |value: f64| value / most * LONGEST;
            let (width, line) = (long(short.median).max(1.0), y + BAR / 2.0);
            let _ = writeln!(
                body,
                r#"<rect x="{LEFT}" y="{:.1}" width="{width:.1}" height="{:.1}" fill="{}"/><path d="M{:.1} {line:.1}H{:.1}" stroke="black"/><text x="{:.1}" y="{:.1}">{}</text>"#,
                y + 1.0,
                BAR - 2.0,
                COLOURS[of as usize],
                LEFT + long(short.least),
                LEFT + long(short.most),
                LEFT + long(short.most) + 8.0,
                y + BAR - 2.5,
                figure(short.median)
            );
            y += BAR;
        }
        y += GAP;
    }
    let mut head = String::new();
    for (n, of) in SYSTEMS.iter().enumerate() {
        let x = LEFT + 110.0 * n as f64;
        let _ = writeln!(
            head,
            r#"<rect x="{x}" y="54" width="11" height="11" fill="{}"/><text x="{}" y="64">{}</text>"#,
            COLOURS[n],
            x + 16.0,
            of.name()
        );
    }
    // The caption is divided into two lines of about the same length.
    let half = caption.len() / 2;
    let at = caption
        .match_indices(' ')
        .map(|(at, _)| at)
        .find(|at| *at >= half);
    let (first, rest) = caption.split_at(at.unwrap_or(caption.len()));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y:.0}\" viewBox=\"0 0 {WIDTH} {y:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"22\">{}</text>\n<text x=\"12\" y=\"38\">{}</text>\n{head}{body}</svg>\n",
        escaped(first),
        escaped(rest.trim())
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

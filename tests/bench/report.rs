//! What was measured: one row for each figure, with all samples of each system; as a table, as JSON and as a plot.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::machine::Machine;
use crate::plot;

/// The system that a figure is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Mayfly,
    Pgbench,
    OpenBao,
    PgBouncer,
}

/// All of them, in the order of the table.
pub const SYSTEMS: [Of; 4] = [Of::Mayfly, Of::Pgbench, Of::OpenBao, Of::PgBouncer];

impl Of {
    /// The system's name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mayfly => "Mayfly",
            Self::Pgbench => "pgbench",
            Self::OpenBao => "OpenBao",
            Self::PgBouncer => "PgBouncer",
        }
    }
}

/// One figure.
#[derive(Debug, Clone)]
pub struct Row {
    pub group: String,
    pub name: String,
    pub unit: &'static str,
    samples: [Vec<f64>; 4],
}

/// Samples in short.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

impl Summary {
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 if middle > 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => *sorted.get(middle)?,
        };
        Some(Self {
            least: *sorted.first()?,
            median,
            most: *sorted.last()?,
        })
    }
}

impl Row {
    /// The samples of a system in short.
    pub fn summary(&self, of: Of) -> Option<Summary> {
        Summary::of(&self.samples[of as usize])
    }

    /// Our median divided by that of another.
    pub fn ratio_to(&self, other: Of) -> Option<f64> {
        let other = self.summary(other)?.median;
        (other > 0.0).then_some(self.summary(Of::Mayfly)?.median / other)
    }
}

/// All rows.
pub struct Report {
    machine: Machine,
    rows: Vec<Row>,
    /// Groups that did not end, with the reason.
    failed: Vec<String>,
}

impl Report {
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            rows: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Adds a sample. Samples of the same group, name and unit are one row.
    pub fn add(&mut self, group: &str, name: &str, unit: &'static str, of: Of, value: f64) {
        let known = self
            .rows
            .iter()
            .position(|row| row.group == group && row.name == name && row.unit == unit);
        let at = known.unwrap_or_else(|| {
            let samples = Default::default();
            self.rows.push(Row {
                group: group.to_owned(),
                name: name.to_owned(),
                unit,
                samples,
            });
            self.rows.len() - 1
        });
        self.rows[at].samples[of as usize].push(value);
        eprintln!("  {group}: {name}: {} {} {unit}", of.name(), figure(value));
    }

    /// Notes that a group did not end.
    pub fn failed(&mut self, group: &str, why: &str) {
        eprintln!("  {group} failed: {why}");
        self.failed.push(format!("{group}: {why}"));
    }

    /// Whether all groups ended.
    pub fn is_whole(&self) -> bool {
        self.failed.is_empty()
    }

    /// The report as a table in Markdown.
    pub fn table(&self) -> String {
        let mut lines = vec![self.machine.sentence(), String::new()];
        lines.push(
            "| row | figure | unit | Mayfly | pgbench | OpenBao | PgBouncer | × pgbench | × OpenBao | × PgBouncer |"
                .to_owned(),
        );
        lines.push("|---|---|---|---|---|---|---|---|---|---|".to_owned());
        for row in &self.rows {
            let ratio = |other| {
                row.ratio_to(other)
                    .map(|ratio| format!("{ratio:.2}"))
                    .unwrap_or_default()
            };
            let cells = SYSTEMS
                .map(|of| row.summary(of).map(cell).unwrap_or_default())
                .join(" | ");
            lines.push(format!(
                "| `{}` | {} | {} | {cells} | {} | {} | {} |",
                row.group,
                row.name,
                row.unit,
                ratio(Of::Pgbench),
                ratio(Of::OpenBao),
                ratio(Of::PgBouncer)
            ));
        }
        for failed in &self.failed {
            lines.extend([String::new(), format!("Failed: {failed}")]);
        }
        lines.join("\n") + "\n"
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let mut object = Map::new();
            object.insert("group".to_owned(), json!(row.group));
            object.insert("name".to_owned(), json!(row.name));
            object.insert("unit".to_owned(), json!(row.unit));
            for of in SYSTEMS {
                let short = row.summary(of).map(|short| {
                    json!({"min": short.least, "median": short.median, "max": short.most, "samples": row.samples[of as usize]})
                });
                object.insert(of.name().to_lowercase(), json!(short));
            }
            object.insert("ratioToPgbench".to_owned(), json!(row.ratio_to(Of::Pgbench)));
            object.insert("ratioToOpenbao".to_owned(), json!(row.ratio_to(Of::OpenBao)));
            object.insert("ratioToPgbouncer".to_owned(), json!(row.ratio_to(Of::PgBouncer)));
            Value::Object(object)
        });
        json!({"machine": self.machine.json(), "rows": rows.collect::<Vec<_>>(), "failed": self.failed})
    }

    /// Writes `table.md`, `bench.json` and `bench.svg` into a directory.
    pub fn write(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join("table.md"), self.table())?;
        std::fs::write(directory.join("bench.json"), format!("{:#}\n", self.json()))?;
        std::fs::write(
            directory.join("bench.svg"),
            plot::svg(&self.rows, &self.machine.sentence()),
        )
    }
}

/// The median, and the range of several samples.
fn cell(short: Summary) -> String {
    if short.least == short.most {
        return figure(short.median);
    }
    format!(
        "{} ({}–{})",
        figure(short.median),
        figure(short.least),
        figure(short.most)
    )
}

/// Three significant digits.
pub fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

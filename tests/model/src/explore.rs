//! Explores everything a model can reach, breadth first, and so finds the shortest path to a violation. Also finds
//! states from which rest cannot be reached any more without another fault.

use std::fmt::{self, Debug};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

/// What can be explored.
pub trait Model {
    /// A state: everything at one moment.
    type State: Copy + Eq + Hash + Debug;
    /// The state in which the model begins.
    fn first(&self) -> Self::State;
    /// Adds all steps that are possible next.
    fn steps(&self, state: &Self::State, to: &mut Vec<Step<Self::State>>);
    /// The rule that a state breaks. `None`: it breaks no rule.
    fn wrong(&self, state: &Self::State) -> Option<&'static str>;
    /// Everything is over, and nothing is left.
    fn is_quiet(&self, state: &Self::State) -> bool;
}

/// One thing that can happen.
#[derive(Debug, Clone, Copy)]
pub struct Step<S> {
    /// The step's name.
    pub what: &'static str,
    /// The step is a fault, or a choice of the user: nothing may depend on it.
    pub optional: bool,
    /// The state after it.
    pub to: S,
}

/// The result of an exploration.
#[derive(Debug)]
pub struct Report {
    /// States reached.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Steps on the shortest path to the farthest state.
    pub depth: u32,
    /// States at rest.
    pub quiet: usize,
    /// The shortest path to a violation.
    pub wrong: Option<Trace>,
}

/// A path to a violation.
pub struct Trace {
    /// The violation.
    pub why: &'static str,
    /// The steps, each with the state after it.
    pub steps: Vec<(&'static str, String)>,
}

impl Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.why)?;
        for (n, (what, state)) in self.steps.iter().enumerate() {
            writeln!(f, "{n:>3}. {what}\n       {state}")?;
        }
        Ok(())
    }
}

const NONE: u32 = u32::MAX;

/// Explores a model to its end, or to the first violation.
///
/// # Panics
/// With more than 2^32 states.
pub fn explore<M: Model>(model: &M) -> Report {
    let mut seen = Seen::new();
    // For each state: its predecessor, and the step from there.
    let mut ways: Vec<(u32, &'static str, u32)> = vec![(NONE, "begin", 0)];
    // These steps are always possible. They are followed backwards.
    let mut sure: Vec<(u32, u32)> = Vec::new();
    let mut quiet: Vec<u32> = Vec::new();
    let mut next = Vec::new();
    let mut steps = 0;
    seen.insert(model.first());
    let mut at = 0;
    let trace = |seen: &Seen<M::State>, ways: &[(u32, &'static str, u32)], why, end: usize| {
        let mut steps = Vec::new();
        let mut place = end;
        loop {
            let (from, what, _) = ways[place];
            steps.push((what, format!("{:?}", seen.states[place])));
            if from == NONE {
                break;
            }
            place = from as usize;
        }
        steps.reverse();
        Trace { why, steps }
    };
    while at < seen.states.len() {
        let state = seen.states[at];
        let (here, depth) = (u32::try_from(at).expect("too many states"), ways[at].2);
        if let Some(why) = model.wrong(&state) {
            return Report {
                states: seen.states.len(),
                steps,
                depth,
                quiet: quiet.len(),
                wrong: Some(trace(&seen, &ways, why, at)),
            };
        }
        if model.is_quiet(&state) {
            quiet.push(here);
        }
        model.steps(&state, &mut next);
        for step in next.drain(..) {
            steps += 1;
            let (there, new) = seen.insert(step.to);
            if new {
                ways.push((here, step.what, depth + 1));
            }
            if !step.optional && there != here {
                sure.push((there, here));
            }
        }
        at += 1;
    }
    let depth = ways.last().map_or(0, |way| way.2);
    let resting = quiet.len();
    let stranded = stranded(seen.states.len(), sure, quiet);
    Report {
        states: seen.states.len(),
        steps,
        depth,
        quiet: resting,
        wrong: stranded.map(|end| {
            trace(
                &seen,
                &ways,
                "from here nothing leads to rest any more",
                end,
            )
        }),
    }
}

/// The first state from which none of `goals` can be reached by the steps (`to`, `from`).
fn stranded(states: usize, mut sure: Vec<(u32, u32)>, goals: Vec<u32>) -> Option<usize> {
    sure.sort_unstable();
    let mut reached = vec![false; states];
    let mut open = goals;
    while let Some(goal) = open.pop() {
        if std::mem::replace(&mut reached[goal as usize], true) {
            continue;
        }
        let first = sure.partition_point(|(to, _)| *to < goal);
        open.extend(
            sure[first..]
                .iter()
                .take_while(|(to, _)| *to == goal)
                .map(|(_, from)| *from),
        );
    }
    reached.iter().position(|reached| !reached)
}

/// The states found so far, in their order, and a table of their places.
struct Seen<S> {
    states: Vec<S>,
    table: Vec<u32>,
    hasher: BuildHasherDefault<Mix>,
}

impl<S: Copy + Eq + Hash> Seen<S> {
    fn new() -> Self {
        Self {
            states: Vec::new(),
            table: vec![NONE; 1 << 16],
            hasher: BuildHasherDefault::default(),
        }
    }

    fn slot(&self, state: &S) -> usize {
        let mask = self.table.len() - 1;
        #[allow(clippy::cast_possible_truncation)]
        let mut slot = self.hasher.hash_one(state) as usize & mask;
        while self.table[slot] != NONE && self.states[self.table[slot] as usize] != *state {
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// The place of the state, and whether it is new.
    fn insert(&mut self, state: S) -> (u32, bool) {
        let slot = self.slot(&state);
        if self.table[slot] != NONE {
            return (self.table[slot], false);
        }
        let place = u32::try_from(self.states.len()).expect("too many states");
        self.table[slot] = place;
        self.states.push(state);
        if self.states.len() * 2 > self.table.len() {
            self.table = vec![NONE; self.table.len() * 2];
            for n in 0..self.states.len() {
                let slot = self.slot(&self.states[n]);
                self.table[slot] = u32::try_from(n).expect("too many states");
            }
        }
        (place, true)
    }
}

/// A quick hash of many small values.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
}

//! The life of a build environment as a state machine: what is, what happens, what is to be done. No system call is made here.
//!
//! ```text
//! Waiting ──ready──► Preparing ──listening──► Serving ──verdict──► Grace ──idle, or time is up──► Ending ──all ended──► Releasing
//!    │                   │                                          ▲                                                        │
//!    │ SIGTERM, mark     └──────────── could not ──────────────────►│ (nothing runs: straight on to Ending)        released  │
//!    └──────────────────────────────────────────────────────────────┘                                                        ▼
//!                                                                                  Done ◄── Announcing ◄──recorded── Recording ⟲ failed
//! ```
//!
//! The machine alone decides the verdict, and hears of every mark until 'exiting' stands: what it says last is what the verdict
//! file, the mark in the image, the exit code and whoever publishes the image go by.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::environment::restarts::{Part, Restarts};
use crate::environment::stage::Stage;
use crate::verdict::Verdict;

/// Where the environment is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// For `ready`.
    Waiting,
    /// Configuration, jail, sshd.
    Preparing,
    /// Sessions come and go.
    Serving,
    /// A verdict stands: nobody new gets in, running commands have a while to finish.
    Grace,
    /// What still runs is being ended.
    Ending,
    /// The image root is being unmounted, synced and cleared of what is ours.
    Releasing,
    /// The verdict is being written to where others look for it.
    Recording,
    /// The others are being told that nobody writes to the image root any more.
    Announcing,
    /// `exiting` stands.
    Done,
}

impl State {
    /// Stage of the job that `status` prints.
    pub(crate) fn stage(self) -> Stage {
        match self {
            Self::Waiting => Stage::Waiting,
            Self::Preparing => Stage::Preparing,
            Self::Serving => Stage::Serving,
            Self::Grace | Self::Ending | Self::Releasing | Self::Recording | Self::Announcing => Stage::Closing,
            Self::Done => Stage::Done,
        }
    }
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The sidecar says that the image is there.
    Ready,
    /// sshd accepts connections.
    Listening,
    /// Somebody marked the image.
    Marked(Verdict),
    /// The customization script failed, or marks cannot be looked at; why has been logged. Nobody has given the image up.
    Failed,
    /// SIGTERM, SIGINT or SIGHUP.
    Stop(Signal),
    /// The environment cannot go on; why has been logged.
    Broken,
    /// A part of it has died, at this moment.
    Died(Part, Instant),
    /// Nobody has come for too long, or it has been open for too long.
    Forgotten,
    /// No session is running.
    Idle,
    /// The time that was given with [`Action::AwaitSessions`] is up.
    GraceOver,
    /// Nothing of the job is running any more.
    AllEnded,
    /// The image root is released.
    Released {
        /// True if nothing of ours is left in it.
        cleanly: bool,
    },
    /// This verdict stands in its signal file.
    Recorded {
        /// The one that was asked for.
        verdict: Verdict,
        /// True if the verdict is recorded in the image too, where the jailed mode asks for that.
        cleanly: bool,
    },
    /// This verdict's signal file could not be made.
    Unrecorded(Verdict),
    /// The others know, or cannot be told.
    Announced {
        /// True if `exiting` was created.
        cleanly: bool,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make everything up to a listening sshd; answer with [`Event::Listening`] or [`Event::Broken`].
    Prepare,
    /// Start what has died again, after this time; answer with [`Event::Died`] if it cannot be.
    Restart(Part, Duration),
    /// End sshd's listener: nobody new gets in.
    StopListening,
    /// Tell people at a terminal, and how long the others have, and hang up.
    HangUp(Verdict, Duration),
    /// Answer with [`Event::Idle`] as soon as no session runs, with [`Event::GraceOver`] after this time.
    AwaitSessions(Duration),
    /// End every process of the job; answer with [`Event::AllEnded`] or [`Event::Broken`].
    EndProcesses,
    /// Unmount, sync, remove leftovers; answer with [`Event::Released`].
    Release,
    /// Mark the image root with the verdict; answer with [`Event::Recorded`] or [`Event::Unrecorded`].
    Record(Verdict),
    /// Touch `exiting`; answer with [`Event::Announced`].
    Announce,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    state: State,
    grace: Duration,
    restarts: Restarts,
    verdict: Option<Verdict>,
    given_up: bool,
    exit_code: u8,
}

/// After SIGTERM nothing is kept, so nothing is waited for but the end of what is in the middle of a write.
const GRACE_AFTER_SIGNAL: Duration = Duration::from_secs(1);

impl Machine {
    /// A machine at the beginning; `grace` is what running commands get after a verdict.
    pub(crate) fn new(grace: Duration) -> Self {
        Self {
            state: State::Waiting,
            grace,
            restarts: Restarts::default(),
            verdict: None,
            given_up: false,
            exit_code: 0,
        }
    }

    /// Where the environment is.
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// What became of the image, so far.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// True if somebody marked the image failed. A signal or a fault fails it without a mark, and its changes are kept.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// The program's exit code, once the state is [`State::Done`].
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// Takes note of `event` and says what is to be done now.
    pub(crate) fn on(&mut self, event: Event) -> Vec<Action> {
        match (self.state, event) {
            (State::Waiting, Event::Ready) => self.go(State::Preparing, [Action::Prepare]),
            // The sidecar has given up, or somebody else, or nothing is left to do.
            (State::Waiting, Event::Marked(verdict)) => {
                self.mark(verdict);
                self.go(State::Ending, [Action::EndProcesses])
            }
            (State::Preparing, Event::Listening) => self.go(State::Serving, []),

            (State::Serving, Event::Marked(verdict)) => {
                self.mark(verdict);
                self.close(self.grace)
            }
            (State::Serving, Event::Forgotten | Event::Failed) => {
                self.judge(Verdict::Failed);
                self.close(self.grace)
            }
            (State::Serving, Event::Died(part, now)) => match self.restarts.next(part, now) {
                Some(wait) => vec![Action::Restart(part, wait)],
                None => {
                    self.broke();
                    self.close(self.grace)
                }
            },
            (State::Grace | State::Ending | State::Releasing | State::Recording, Event::Marked(verdict)) => {
                self.mark(verdict);
                vec![]
            }
            (State::Grace | State::Ending | State::Releasing | State::Recording, Event::Failed) => {
                self.judge(Verdict::Failed);
                vec![]
            }
            // The mark was made while 'exiting' was created; whoever packs the image reads the verdict after that.
            (State::Announcing, Event::Marked(Verdict::Failed)) if self.verdict != Some(Verdict::Failed) => {
                self.mark(Verdict::Failed);
                vec![Action::Record(Verdict::Failed)]
            }
            (State::Serving, Event::Stop(signal)) => {
                self.stopped(signal);
                self.close(GRACE_AFTER_SIGNAL)
            }
            (State::Waiting | State::Preparing | State::Grace, Event::Stop(signal)) => {
                self.stopped(signal);
                self.go(State::Ending, [Action::StopListening, Action::EndProcesses])
            }
            (State::Ending, Event::Stop(signal)) => {
                self.stopped(signal);
                vec![]
            }
            (State::Waiting | State::Preparing | State::Grace, Event::Broken) => {
                self.broke();
                self.go(State::Ending, [Action::StopListening, Action::EndProcesses])
            }
            (State::Serving, Event::Broken) => {
                self.broke();
                self.close(self.grace)
            }
            (State::Grace, Event::Idle | Event::GraceOver) => self.go(State::Ending, [Action::EndProcesses]),
            (State::Ending, Event::Broken) => {
                self.broke();
                self.go(State::Releasing, [Action::Release])
            }
            (State::Ending, Event::AllEnded) => self.go(State::Releasing, [Action::Release]),
            (State::Releasing, Event::Released { cleanly }) => {
                self.broke_unless(cleanly);
                self.record()
            }
            (State::Recording, Event::Recorded { verdict, cleanly }) => {
                self.broke_unless(cleanly);
                if self.verdict == Some(verdict) {
                    self.go(State::Announcing, [Action::Announce])
                } else {
                    self.record()
                }
            }
            (State::Recording, Event::Unrecorded(verdict)) => {
                self.broke();
                // Without its verdict file a failed image must not be announced: it would look complete.
                if self.verdict == Some(verdict) { self.go(State::Done, []) } else { self.record() }
            }
            (State::Announcing, Event::Announced { cleanly }) => {
                self.broke_unless(cleanly);
                self.go(State::Done, [])
            }
            // Everything else is no news where it happens: a second `ready`, a session that ends while all is well, a signal when the
            // image root is being released.
            _ => vec![],
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    fn close(&mut self, grace: Duration) -> Vec<Action> {
        let verdict = self.verdict.unwrap_or(Verdict::Failed);
        self.go(State::Grace, [Action::StopListening, Action::HangUp(verdict, grace), Action::AwaitSessions(grace)])
    }

    fn record(&mut self) -> Vec<Action> {
        let verdict = *self.verdict.get_or_insert(Verdict::Failed);
        self.go(State::Recording, [Action::Record(verdict)])
    }

    fn mark(&mut self, verdict: Verdict) {
        self.given_up |= verdict == Verdict::Failed;
        self.judge(verdict);
    }

    fn judge(&mut self, verdict: Verdict) {
        // Once failed, always failed.
        self.verdict = self.verdict.max(Some(verdict));
    }

    fn stopped(&mut self, signal: Signal) {
        self.judge(Verdict::Failed);
        if self.exit_code == 0 {
            self.exit_code = 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0));
        }
    }

    fn broke(&mut self) {
        self.judge(Verdict::Failed);
        self.exit_code = 1;
    }

    fn broke_unless(&mut self, cleanly: bool) {
        if !cleanly {
            self.broke();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GRACE: Duration = Duration::from_secs(10);
    const RELEASED: Event = Event::Released { cleanly: true };
    const ANNOUNCED: Event = Event::Announced { cleanly: true };

    fn recorded(verdict: Verdict) -> Event {
        Event::Recorded { verdict, cleanly: true }
    }

    fn serving() -> Machine {
        let mut machine = Machine::new(GRACE);
        assert_eq!(machine.on(Event::Ready), [Action::Prepare]);
        assert_eq!(machine.on(Event::Listening), []);
        machine
    }

    #[test]
    fn a_failed_mark_that_is_made_as_the_others_are_told_is_recorded_too() {
        let mut machine = serving();
        for event in [Event::Marked(Verdict::Complete), Event::Idle, Event::AllEnded, RELEASED] {
            machine.on(event);
        }
        assert_eq!(machine.on(recorded(Verdict::Complete)), [Action::Announce]);
        assert_eq!(machine.on(Event::Marked(Verdict::Failed)), [Action::Record(Verdict::Failed)]);
        assert_eq!(machine.on(ANNOUNCED), []);
        assert_eq!(machine.on(recorded(Verdict::Failed)), []);
        assert_eq!(
            (machine.state(), machine.verdict(), machine.is_given_up()),
            (State::Done, Some(Verdict::Failed), true)
        );
    }

    #[test]
    fn a_completed_image() {
        let mut machine = serving();
        let close = [Action::StopListening, Action::HangUp(Verdict::Complete, GRACE), Action::AwaitSessions(GRACE)];
        assert_eq!(machine.on(Event::Marked(Verdict::Complete)), close);
        assert_eq!(machine.on(Event::Idle), [Action::EndProcesses]);
        assert_eq!(machine.on(Event::AllEnded), [Action::Release]);
        assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Complete)]);
        assert_eq!(machine.on(recorded(Verdict::Complete)), [Action::Announce]);
        assert_eq!(machine.on(ANNOUNCED), []);
        assert_eq!(
            (machine.state(), machine.verdict(), machine.exit_code()),
            (State::Done, Some(Verdict::Complete), 0)
        );
    }

    #[test]
    fn failed_wins_however_late_it_comes() {
        let mut machine = serving();
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::GraceOver);
        machine.on(Event::Marked(Verdict::Failed));
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::AllEnded);
        assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Failed)]);
        assert_eq!(machine.on(recorded(Verdict::Failed)), [Action::Announce]);
        machine.on(ANNOUNCED);
        assert_eq!(machine.exit_code(), 0, "a marked failure is the sidecar's to report");
    }

    #[test]
    fn failed_wins_while_the_image_root_is_released_and_while_the_verdict_is_recorded() {
        for before_recording in [true, false] {
            let mut machine = serving();
            machine.on(Event::Marked(Verdict::Complete));
            machine.on(Event::Idle);
            machine.on(Event::AllEnded);
            if before_recording {
                machine.on(Event::Marked(Verdict::Failed));
            } else {
                assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Complete)]);
                machine.on(Event::Marked(Verdict::Failed));
            }
            let next = machine.on(if before_recording { RELEASED } else { recorded(Verdict::Complete) });
            assert_eq!(next, [Action::Record(Verdict::Failed)]);
            assert_eq!(machine.on(recorded(Verdict::Failed)), [Action::Announce]);
            assert_eq!((machine.verdict(), machine.exit_code()), (Some(Verdict::Failed), 0));
        }
    }

    #[test]
    fn a_verdict_that_cannot_be_recorded_is_failed_and_is_not_announced_without_its_file() {
        let mut machine = serving();
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::Idle);
        machine.on(Event::AllEnded);
        machine.on(RELEASED);
        let not_in_image = Event::Recorded { verdict: Verdict::Complete, cleanly: false };
        assert_eq!(machine.on(not_in_image), [Action::Record(Verdict::Failed)]);
        assert_eq!(machine.on(Event::Unrecorded(Verdict::Failed)), []);
        assert_eq!((machine.state(), machine.exit_code()), (State::Done, 1));
    }

    #[test]
    fn a_signal_marks_failed_and_is_the_exit_code() {
        for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
            let mut machine = Machine::new(GRACE);
            assert_eq!(machine.on(Event::Stop(signal)), [Action::StopListening, Action::EndProcesses]);
            machine.on(Event::AllEnded);
            assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Failed)]);
            assert_eq!(machine.exit_code(), code);
        }
    }

    #[test]
    fn what_cannot_be_released_is_never_complete() {
        let mut machine = serving();
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::Idle);
        machine.on(Event::AllEnded);
        assert_eq!(machine.on(Event::Released { cleanly: false }), [Action::Record(Verdict::Failed)]);
        assert_eq!((machine.verdict(), machine.exit_code()), (Some(Verdict::Failed), 1));
    }

    #[test]
    fn only_a_mark_gives_the_image_up() {
        for (event, given_up) in [
            (Event::Marked(Verdict::Failed), true),
            (Event::Failed, false),
            (Event::Forgotten, false),
            (Event::Stop(Signal::SIGTERM), false),
            (Event::Broken, false),
        ] {
            let mut machine = serving();
            machine.on(event);
            assert_eq!((machine.verdict(), machine.is_given_up()), (Some(Verdict::Failed), given_up), "{event:?}");
            machine.on(Event::Marked(Verdict::Failed));
            assert!(machine.is_given_up(), "however late");
        }
    }

    #[test]
    fn what_dies_is_started_again_until_it_has_died_too_often() {
        let mut machine = serving();
        let died = Event::Died(Part::Sshd, Instant::now());
        for _ in 0..5 {
            assert!(matches!(machine.on(died)[..], [Action::Restart(Part::Sshd, _)]));
        }
        assert_eq!(machine.on(died)[0], Action::StopListening);
        assert_eq!((machine.verdict(), machine.exit_code()), (Some(Verdict::Failed), 1));
        assert_eq!(machine.on(died), [], "nothing is started again in a close");
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        proptest::sample::select(&Verdict::ALL[..])
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Ready),
            Just(Event::Listening),
            verdict().prop_map(Event::Marked),
            Just(Event::Stop(Signal::SIGTERM)),
            Just(Event::Broken),
            Just(Event::Failed),
            Just(Event::Died(Part::Sshd, Instant::now())),
            Just(Event::Died(Part::Jail, Instant::now())),
            Just(Event::Forgotten),
            Just(Event::Idle),
            Just(Event::GraceOver),
            Just(Event::AllEnded),
            any::<bool>().prop_map(|cleanly| Event::Released { cleanly }),
            (verdict(), any::<bool>()).prop_map(|(verdict, cleanly)| Event::Recorded { verdict, cleanly }),
            verdict().prop_map(Event::Unrecorded),
            any::<bool>().prop_map(|cleanly| Event::Announced { cleanly }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10 * ProptestConfig::default().cases))]
        #[test]
        fn in_no_order_of_events_is_a_step_left_out_or_a_failure_forgotten(events in proptest::collection::vec(event(), 0..40)) {
            let mut machine = Machine::new(GRACE);
            let (mut ended, mut failed, mut recorded) = (false, false, None);
            for event in events {
                let before = machine.state();
                ended |= before == State::Ending && matches!(event, Event::AllEnded | Event::Broken);
                failed |= matches!(event, Event::Marked(Verdict::Failed) | Event::Failed)
                    && matches!(before, State::Serving | State::Grace | State::Ending | State::Releasing | State::Recording);
                if let (State::Recording, Event::Recorded { verdict, .. }) = (before, event) {
                    recorded = Some(verdict);
                }
                let actions = machine.on(event);
                for action in &actions {
                    match action {
                        Action::Release => prop_assert!(ended, "released before all had ended"),
                        Action::Record(verdict) => {
                            prop_assert_eq!(Some(*verdict), machine.verdict());
                            prop_assert!(!(failed && *verdict == Verdict::Complete), "complete after failed");
                            prop_assert!(*verdict == Verdict::Failed || machine.exit_code() == 0);
                        }
                        Action::Announce => prop_assert_eq!(recorded, machine.verdict(), "another verdict than recorded"),
                        _ => {}
                    }
                }
                // A state that waits for an answer was entered by asking for it.
                let asked = |wanted: fn(&Action) -> bool| before == machine.state() || actions.iter().any(wanted);
                match machine.state() {
                    State::Preparing => prop_assert!(asked(|a| *a == Action::Prepare)),
                    State::Grace => prop_assert!(asked(|a| matches!(a, Action::AwaitSessions(_)))),
                    State::Ending => prop_assert!(asked(|a| *a == Action::EndProcesses)),
                    State::Releasing => prop_assert!(asked(|a| *a == Action::Release)),
                    State::Recording => prop_assert!(asked(|a| matches!(a, Action::Record(_)))),
                    State::Announcing => prop_assert!(asked(|a| *a == Action::Announce)),
                    State::Done => prop_assert!(machine.verdict().is_some()),
                    State::Waiting | State::Serving => {}
                }
            }
        }
    }
}

//! The life of a build environment as a state machine: states, events and actions. It makes no system call.
//!
//! ```text
//! Waiting ──ready──► Preparing ──listening──► Serving ──verdict──► Grace ──idle, or timeout──► Ending
//!    │                   │                                                                     ▲  │ all ended
//!    │ mark, SIGTERM     │ error, SIGTERM                                                      │  ▼
//!    └───────────────────┴─────────────────────────────────────────────────────────────────────┘ Releasing
//!                                                                                                 │ released
//!                                        Done ◄──announced── Announcing ◄──recorded── Recording ◄─┘
//! ```
//!
//! The machine alone decides the verdict, and takes marks into account until `exiting` exists. Its last verdict
//! determines the verdict file, the mark in the image, the exit code and whether the image is published.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::environment::restarts::{Part, Restarts};
use crate::environment::stage::Stage;
use crate::verdict::Verdict;

/// State of the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Waits for `ready`.
    Waiting,
    /// Makes configuration, jail and sshd.
    Preparing,
    /// Accepts sessions.
    Serving,
    /// A verdict exists: no new connection is accepted, running commands may finish.
    Grace,
    /// Ends the remaining processes.
    Ending,
    /// Unmounts and syncs the image root, and removes everything of ours from it.
    Releasing,
    /// Writes the verdict to the verdict file and the image.
    Recording,
    /// Creates `exiting`: nothing writes to the image root any more.
    Announcing,
    /// `exiting` exists.
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

/// Event that the machine reacts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// `ready` exists: the image root is complete.
    Ready,
    /// sshd accepts connections.
    Listening,
    /// A session, an administrator or another container marked the image.
    Marked(Verdict),
    /// The customization script failed, or marks cannot be read; the reason has been logged. This is not a mark:
    /// changes may be kept.
    Failed,
    /// SIGTERM, SIGINT or SIGHUP.
    Stop(Signal),
    /// A step of the environment failed; the reason has been logged.
    Broken,
    /// A part of the environment died at this time.
    Died(Part, Instant),
    /// A time limit is over: no session for too long, or the environment open for too long.
    Forgotten,
    /// No session is running.
    Idle,
    /// The time given in [`Action::AwaitSessions`] is over.
    GraceOver,
    /// No process of the job is running any more.
    AllEnded,
    /// The image root is released.
    Released {
        /// True if nothing of ours is left in the image root.
        cleanly: bool,
    },
    /// The verdict file exists.
    Recorded {
        /// The verdict of [`Action::Record`].
        verdict: Verdict,
        /// True if the image has the mark too, which the jailed mode requires.
        cleanly: bool,
    },
    /// The verdict file could not be created.
    Unrecorded(Verdict),
    /// `exiting` was created, or could not be.
    Announced {
        /// True if `exiting` was created.
        cleanly: bool,
    },
}

/// Action that the supervisor carries out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make the jail and start sshd; answer with [`Event::Listening`] or [`Event::Broken`].
    Prepare,
    /// Restart a part that died, after this time; answer with [`Event::Died`] if that fails.
    Restart(Part, Duration),
    /// End sshd's listener, so that no new connection is accepted.
    StopListening,
    /// Notify interactive shells of the verdict and the grace period of commands, and hang them up.
    HangUp(Verdict, Duration),
    /// Wait for sessions; answer with [`Event::Idle`] when none is running, or [`Event::GraceOver`] after this time.
    AwaitSessions(Duration),
    /// End every process of the job; answer with [`Event::AllEnded`] or [`Event::Broken`].
    EndProcesses,
    /// Unmount and sync the image root and remove leftovers; answer with [`Event::Released`].
    Release,
    /// Create the verdict file and the mark in the image; answer with [`Event::Recorded`] or [`Event::Unrecorded`].
    Record(Verdict),
    /// Create `exiting`; answer with [`Event::Announced`].
    Announce,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Machine {
    state: State,
    grace: Duration,
    restarts: Restarts,
    verdict: Option<Verdict>,
    given_up: bool,
    exit_code: u8,
}

/// Grace period after a signal: the image has failed, so commands only get time to finish a write.
const GRACE_AFTER_SIGNAL: Duration = Duration::from_secs(1);

impl Machine {
    /// Creates a machine in state [`State::Waiting`]; `grace` is the grace period of running commands after a verdict.
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

    /// Current state.
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// Verdict so far.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Returns whether somebody marked the image failed. After a failure without a mark (a signal or an error) changes
    /// are kept.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// Exit code of the program, valid in state [`State::Done`].
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// Changes the state by `event` and returns the actions to carry out now.
    pub(crate) fn on(&mut self, event: Event) -> Vec<Action> {
        match (self.state, event) {
            (State::Waiting, Event::Ready) => self.go(State::Preparing, [Action::Prepare]),
            // The image was marked before `ready` was created: the sidecar or an administrator has given up, or nothing
            // is left to do.
            (State::Waiting, Event::Marked(verdict)) => {
                self.mark(verdict);
                self.go(State::Ending, [Action::EndProcesses])
            }
            (State::Preparing, Event::Listening) => self.go(State::Serving, []),
            // Accept `failed` before sshd listens: an environment on another host takes long to open.
            (State::Preparing, Event::Marked(Verdict::Failed)) => {
                self.mark(Verdict::Failed);
                self.go(State::Ending, [Action::StopListening, Action::EndProcesses])
            }

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
            // Record a mark that was set while 'exiting' was being created: the sidecar reads the verdict after
            // 'exiting'.
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
                // Do not create 'exiting' without the verdict file: a failed image would look complete.
                if self.verdict == Some(verdict) { self.go(State::Done, []) } else { self.record() }
            }
            (State::Announcing, Event::Announced { cleanly }) => {
                self.broke_unless(cleanly);
                self.go(State::Done, [])
            }
            // Ignore every other event: a second `ready`, an idle environment while serving, a signal while the image
            // root is being released.
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
        // `failed` is greater than `complete`, and final.
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
    fn failed_mark_made_while_exiting_is_created_is_recorded() {
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
    fn complete_mark_closes_in_order_with_exit_code_0() {
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
    fn late_failed_mark_wins_over_complete() {
        let mut machine = serving();
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::GraceOver);
        machine.on(Event::Marked(Verdict::Failed));
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::AllEnded);
        assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Failed)]);
        assert_eq!(machine.on(recorded(Verdict::Failed)), [Action::Announce]);
        machine.on(ANNOUNCED);
        assert_eq!(machine.exit_code(), 0, "a marked failure is a verdict and not an error");
    }

    #[test]
    fn failed_mark_wins_during_release_and_while_the_verdict_is_recorded() {
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
    fn verdict_that_cannot_be_recorded_is_failed_and_exiting_needs_the_verdict_file() {
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
    fn signal_records_failed_and_sets_the_exit_code() {
        for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
            let mut machine = Machine::new(GRACE);
            assert_eq!(machine.on(Event::Stop(signal)), [Action::StopListening, Action::EndProcesses]);
            machine.on(Event::AllEnded);
            assert_eq!(machine.on(RELEASED), [Action::Record(Verdict::Failed)]);
            assert_eq!(machine.exit_code(), code);
        }
    }

    #[test]
    fn image_root_that_cannot_be_released_is_failed() {
        let mut machine = serving();
        machine.on(Event::Marked(Verdict::Complete));
        machine.on(Event::Idle);
        machine.on(Event::AllEnded);
        assert_eq!(machine.on(Event::Released { cleanly: false }), [Action::Record(Verdict::Failed)]);
        assert_eq!((machine.verdict(), machine.exit_code()), (Some(Verdict::Failed), 1));
    }

    #[test]
    fn only_a_failed_mark_gives_the_changes_up() {
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
            assert!(machine.is_given_up(), "a later mark counts");
        }
    }

    #[test]
    fn dead_part_is_restarted_five_times_and_then_the_environment_closes() {
        let mut machine = serving();
        let died = Event::Died(Part::Sshd, Instant::now());
        for _ in 0..5 {
            assert!(matches!(machine.on(died)[..], [Action::Restart(Part::Sshd, _)]));
        }
        assert_eq!(machine.on(died)[0], Action::StopListening);
        assert_eq!((machine.verdict(), machine.exit_code()), (Some(Verdict::Failed), 1));
        assert_eq!(machine.on(died), [], "nothing is restarted during a close");
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
        fn no_order_of_events_skips_a_step_or_forgets_a_failure(events in proptest::collection::vec(event(), 0..40)) {
            let mut machine = Machine::new(GRACE);
            let (mut ended, mut failed, mut recorded) = (false, false, None);
            for event in events {
                let before = machine.state();
                ended |= before == State::Ending && matches!(event, Event::AllEnded | Event::Broken);
                failed |= matches!(event, Event::Marked(Verdict::Failed) | Event::Failed)
                    && !matches!(before, State::Waiting | State::Preparing | State::Announcing | State::Done);
                if let (State::Recording, Event::Recorded { verdict, .. }) = (before, event) {
                    recorded = Some(verdict);
                }
                let actions = machine.on(event);
                for action in &actions {
                    match action {
                        Action::Release => prop_assert!(ended, "released before all processes had ended"),
                        Action::Record(verdict) => {
                            prop_assert_eq!(Some(*verdict), machine.verdict());
                            prop_assert!(!(failed && *verdict == Verdict::Complete), "recorded complete after failed");
                            prop_assert!(*verdict == Verdict::Failed || machine.exit_code() == 0);
                        }
                        Action::Announce => prop_assert_eq!(recorded, machine.verdict(), "verdict was not recorded"),
                        _ => {}
                    }
                }
                // Entering a state that waits for an answer has to request that answer.
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
